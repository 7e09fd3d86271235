"""Which GPU a transport's buffers live on, the calling thread's attachment to it, and a stream. Knows no transport."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

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


class Mark(Protocol):
    """A point on a stream."""

    def query(self) -> bool:
        """Whether everything before it is complete; never blocks."""
        ...


class DeviceStream:
    """A stream of one device, ahead of what steps have queued; to be used from one thread at a time, any one."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]

    @property
    def handle(self) -> int:
        """CUDA's."""
        return int(self._stream.cuda_stream)

    def current(self) -> AbstractContextManager[None]:
        """Inside, the calling thread is attached to the device."""
        return torch.cuda.device(self._device)

    def mark(self) -> Mark:
        """All that was queued until now."""
        mark: Mark = self._stream.record_event()
        return mark

    def synchronize(self) -> None:
        """Block this thread until the stream is empty."""
        self._stream.synchronize()
