"""Residual addition and normalisation in one pass: add_rms_norm and add_layer_norm."""

from vitzoo.kernels.add_norm.op import add_layer_norm, add_rms_norm

__all__ = ["add_layer_norm", "add_rms_norm"]
