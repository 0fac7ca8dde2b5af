"""Window attention (Swin's, Twins' and HiLo's windows) on a map, without copies into windows and back."""

from vitzoo.kernels.window_attention.op import window_attention

__all__ = ["window_attention"]
