"""Chooses Triton's interpreter before Triton is imported, which torch's own modules do, where there is no GPU."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
