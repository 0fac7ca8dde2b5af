"""The scan of Mamba-2 (a linear recurrence with one input-dependent decay a head)."""

from vitzoo.kernels.ssd_scan.op import ssd_scan

__all__ = ["ssd_scan"]
