"""What launchers of Triton kernels ask of a device."""

from __future__ import annotations

from functools import cache
from typing import Final

import torch

LOG2_E: Final = 1.4426950408889634  # exp(x) = exp2(x * LOG2_E), and exp2 is one instruction
_INTERPRETED_MULTIPROCESSORS: Final = 4


@cache
def num_multiprocessors(device: torch.device) -> int:
    """On the CPU, where kernels are interpreted, a number that makes programs share work."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


@cache
def is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == 9


def current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
