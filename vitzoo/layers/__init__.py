"""Layers that two families or more share, or that users build with."""

from vitzoo.layers.attention import HiLo
from vitzoo.layers.conv import DeformConv2d
from vitzoo.layers.polyphase import polyphase_anchor

__all__ = ["DeformConv2d", "HiLo", "polyphase_anchor"]
