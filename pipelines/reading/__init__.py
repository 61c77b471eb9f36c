"""From the tables to batches: encoded rows, pixels of a view, masks."""
