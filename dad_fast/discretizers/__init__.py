"""Discretizers: VQGAN, JPEG and identity, by name."""
