"""Checkpoints: one file per format, a table from names to sources, and the way from tensors to parameters."""
