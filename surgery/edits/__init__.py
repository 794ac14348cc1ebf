"""What may be changed in a model, and the losses that change it: one file per kind of edit."""
