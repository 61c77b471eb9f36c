"""Parts of the `prepare` stage: sources, units, decoding apart, reports."""
