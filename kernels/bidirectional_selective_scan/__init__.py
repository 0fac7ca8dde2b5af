"""Vim's bidirectional selective scan: both directions over the tokens in one call, without flipped copies."""

from vitzoo.kernels.bidirectional_selective_scan.flops import (
    bidirectional_selective_scan_bwd_flops,
    bidirectional_selective_scan_flops,
)
from vitzoo.kernels.bidirectional_selective_scan.op import bidirectional_selective_scan

__all__ = [
    "bidirectional_selective_scan",
    "bidirectional_selective_scan_bwd_flops",
    "bidirectional_selective_scan_flops",
]
