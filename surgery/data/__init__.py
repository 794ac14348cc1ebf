"""The data sets: one module per set, each yielding small frozen records; nothing here imports torch."""
