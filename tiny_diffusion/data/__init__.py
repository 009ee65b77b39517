"""Data: the catalogue of data sets, how they are opened, and the batches that training reads."""
