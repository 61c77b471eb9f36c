"""What stored tokens are worth: the experiments of protocol.md, made of the product's stages."""
