"""Parts of the `tokenize` stage: units, the pool of encoders, reports."""
