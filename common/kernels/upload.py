"""Copies of small host arrays to the device, several in one transfer, without waiting for the device.

The transfer starts from pinned memory, which torch's allocator does not hand out again before the copy is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

_ALIGNMENT_BYTES: Final = 16
_TORCH_DTYPES: Final = {np.dtype(np.int32): torch.int32, np.dtype(np.int64): torch.int64}

IntArray = npt.NDArray[np.int32] | npt.NDArray[np.int64]


def upload(arrays: Sequence[IntArray], device: torch.device) -> list[torch.Tensor]:
    """The arrays on the device, in new memory."""
    offsets: list[int] = []
    num_bytes = 0
    for array in arrays:
        offsets.append(num_bytes)
        num_bytes += -(-array.nbytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    staging = host_memory(max(num_bytes, 1), device)
    table = staging.numpy()
    for offset, array in zip(offsets, arrays, strict=True):
        table[offset : offset + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    packed = staging.to(device, non_blocking=True)
    return [
        packed[offset : offset + array.nbytes].view(_TORCH_DTYPES[array.dtype]).view(array.shape)
        for offset, array in zip(offsets, arrays, strict=True)
    ]


def host_memory(num_bytes: int, device: torch.device) -> torch.Tensor:
    """[num_bytes] uint8 in host memory that the device can copy from while the host goes on."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def overwrite(target: torch.Tensor, array: IntArray) -> None:
    """Replace a tensor on the device by an array of its shape. target: contiguous."""
    staging = host_memory(array.nbytes, target.device)
    staging.numpy()[:] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    target.copy_(staging.view(_TORCH_DTYPES[array.dtype]).view(array.shape), non_blocking=True)
