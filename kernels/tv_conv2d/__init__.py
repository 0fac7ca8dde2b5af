"""Translation-variant depthwise convolution (TVConv)."""

from vitzoo.kernels.tv_conv2d.op import tv_conv2d

__all__ = ["tv_conv2d"]
