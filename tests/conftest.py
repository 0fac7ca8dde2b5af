"""Shares out the cores and chooses Triton's interpreter, before torch's own modules import Triton, without a GPU."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Workers of xdist share the cores; threads that wait for each other while spinning cost more than they give.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(workers)))

# rich reads the width when a console is made, at import; a table must not wrap where there is no terminal
os.environ["COLUMNS"] = "200"
