"""RMS norm with a gate before or behind it (Mamba-2)."""

from vitzoo.kernels.rms_norm_gated.op import rms_norm_gated

__all__ = ["rms_norm_gated"]
