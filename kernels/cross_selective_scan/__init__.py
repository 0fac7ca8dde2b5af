"""VMamba's four-direction selective scan of a map, without the four copies of it."""

from vitzoo.kernels.cross_selective_scan.flops import (
    cross_selective_scan_bwd_flops,
    cross_selective_scan_flops,
)
from vitzoo.kernels.cross_selective_scan.op import cross_selective_scan

__all__ = ["cross_selective_scan", "cross_selective_scan_bwd_flops", "cross_selective_scan_flops"]
