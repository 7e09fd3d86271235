"""Where a benchmark of an engine computes: on the GPU, or without one as a rehearsal whose times say nothing."""

from __future__ import annotations

import os
import sys

import torch

_INTERPRET = "TRITON_INTERPRET"


def compute_device(rehearse: bool = False) -> torch.device:
    """The first GPU; without one, or to `rehearse`, the CPU.

    There kernels are interpreted, which is decided when they are imported: where that has happened otherwise, this
    process starts itself again.
    """
    torch.set_num_threads(1)
    if torch.cuda.is_available() and not rehearse:
        return torch.device("cuda")
    if os.environ.get(_INTERPRET) != "1":
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | {_INTERPRET: "1"})
    print("REHEARSAL on the CPU, a small model and interpreted kernels: times say nothing", flush=True)
    return torch.device("cpu")


def device_name(device: torch.device) -> str:
    return "CPU" if device.type == "cpu" else torch.cuda.get_device_name(device)
