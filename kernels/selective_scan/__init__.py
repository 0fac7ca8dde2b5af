"""Selective scan (Mamba's recurrence with input-dependent step, B and C)."""

from vitzoo.kernels.selective_scan.flops import selective_scan_bwd_flops, selective_scan_flops
from vitzoo.kernels.selective_scan.op import selective_scan

__all__ = ["selective_scan", "selective_scan_bwd_flops", "selective_scan_flops"]
