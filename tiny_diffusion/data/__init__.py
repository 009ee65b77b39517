"""Data: what sets there are, how they are opened, and the batches that training reads."""
