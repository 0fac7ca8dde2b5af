"""VMamba's cross-scan: four routes over a map, and their merge."""

from vitzoo.kernels.cross_scan.op import cross_merge, cross_scan

__all__ = ["cross_merge", "cross_scan"]
