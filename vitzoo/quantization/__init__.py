"""Quantization: quantizers, how they are fitted, and transforms that make a network easier to quantize."""
