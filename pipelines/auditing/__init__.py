"""Parts of the `audit` stage."""
