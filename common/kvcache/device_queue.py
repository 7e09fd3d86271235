"""Where the copies of one storage run: a stream of its own on a GPU, the calling thread on a CPU.

Nothing here waits for the whole device, so a step that computes meanwhile is not held up. Knows no blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch


class DeviceWork:
    """Copies that were queued. Everything they touch is lent until they are complete."""

    def __init__(self, event: torch.cuda.Event | None) -> None:
        self._event = event

    def done(self) -> bool:
        """Whether everything is complete; never blocks."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Block this thread until everything is complete; other threads of the process run on."""
        if self._event is not None:
            self._event.synchronize()


class DeviceQueue:
    """Work queued under `entered` runs in order. One thread at a time may use it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """What is launched inside runs on this queue, on its device."""
        stream: AbstractContextManager[object] = contextlib.nullcontext()
        if self._stream is not None:
            stream = torch.cuda.stream(self._stream)
        with torch.inference_mode(), stream:
            yield

    def mark(self) -> DeviceWork:
        """All that was queued until now."""
        return DeviceWork(None if self._stream is None else self._stream.record_event())

    def upload(self, words: torch.Tensor) -> torch.Tensor:
        """A copy of a host tensor on the device, without waiting. The pinned memory in between is recycled by torch."""
        if self._stream is None:
            return words
        return words.pin_memory().to(self._device, non_blocking=True)

    def download(self, words: torch.Tensor) -> torch.Tensor:
        """A copy in host memory; waits for what was queued before, and for nothing else."""
        if self._stream is None:
            return words
        host = torch.empty(words.shape, dtype=words.dtype, pin_memory=True)
        host.copy_(words, non_blocking=True)
        self.mark().wait()
        return host
