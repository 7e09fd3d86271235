"""Which sizes of heads each kind of device computes, as data: fronts read it, which load neither torch nor Triton."""

from __future__ import annotations

from typing import Final

from common.errors import ModelError

# Attention tiles span whole heads, and a tile's sides are powers of two; 256 in float32 is more than a program's shared
# memory. A CPU takes any.
CUDA_HEAD_DIMS: Final = (16, 32, 64, 128)


def check_head_dim(head_dim: int, device: str) -> None:
    """Raises `ModelError` for heads that the kernels of the device, `cpu` or `cuda`, do not take."""
    if device == "cuda" and head_dim not in CUDA_HEAD_DIMS:
        served = ", ".join(map(str, CUDA_HEAD_DIMS))
        raise ModelError(f"config.json: head_dim = {head_dim} is not served on cuda, only {served}")
