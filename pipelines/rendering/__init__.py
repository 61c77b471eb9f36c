"""Parts of the `render` stage."""
