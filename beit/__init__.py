"""BEiT as a model library: torch, numpy, Pillow and safetensors; no cluster, no files, no env."""
