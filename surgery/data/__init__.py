"""The data sets: one module per set, each yielding small frozen records; nothing here imports torch."""

import csv

csv.field_size_limit(2**31 - 1)  # a whole document may stand in one cell; the module's own limit is 131,072 characters
