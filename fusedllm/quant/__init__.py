"""Quantized representations of weights: schemes that say how codes become numbers."""
