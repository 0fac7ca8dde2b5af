"""Selective scan (Mamba's recurrence with input-dependent step, B and C)."""

from vitzoo.kernels.selective_scan.op import selective_scan

__all__ = ["selective_scan"]
