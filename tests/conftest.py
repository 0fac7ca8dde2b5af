"""Chooses Triton's interpreter before Triton is imported, which torch's own modules do, where there is no GPU."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# rich reads the width when a console is made, at import; a table must not wrap where there is no terminal
os.environ["COLUMNS"] = "200"
