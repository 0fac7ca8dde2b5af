"""Layers that two families or more share, or that users build with."""

from vitzoo.layers.attention import HiLo
from vitzoo.layers.conv import DeformConv2d

__all__ = ["DeformConv2d", "HiLo"]
