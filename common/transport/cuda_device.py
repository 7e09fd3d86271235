"""Which GPU a transport's buffers live on, and the calling thread's attachment to it. Knows no transport."""

from __future__ import annotations

import torch

from common.errors import FailedPrecondition, InvalidArgument


def attached_cuda_device(memory: str) -> torch.device:
    """The device of `cuda` or `cuda:1`, made current in this thread with a context that exists.

    Both matter to libraries that look at the thread's context when they open. Raises `InvalidArgument` for anything
    else, `FailedPrecondition` if torch sees no GPU.
    """
    kind, _, index = memory.partition(":")
    if kind != "cuda" or (":" in memory and not index.isdigit()):
        raise InvalidArgument("memory", memory, "cuda or cuda:N")
    if not torch.cuda.is_available():
        raise FailedPrecondition(f"memory {memory!r} needs a GPU, and torch sees none")
    device = torch.device("cuda", int(index) if index else torch.cuda.current_device())
    torch.cuda.set_device(device)
    torch.cuda.synchronize(device)
    return device
