"""Retention (linear attention with a constant decay a head)."""

from vitzoo.kernels.retention.op import retention

__all__ = ["retention"]
