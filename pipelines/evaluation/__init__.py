"""Frozen features and the probes that judge them."""
