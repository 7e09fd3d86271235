"""Without a GPU the Triton kernels run under Triton's interpreter: decided before any of them is imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
