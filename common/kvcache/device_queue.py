"""Where the copies of one storage run: a stream of its own on a GPU, the calling thread on a CPU.

Nothing here waits for the whole device, so a step that computes meanwhile is not held up. Knows no blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager

import numpy as np
import numpy.typing as npt
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
    """Work queued under `entered` runs in order. One thread at a time may use it.

    Small numbers go to the device and come back through pinned memory that is kept, as pinning anew costs more than
    everything else that is done for a slot.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._pinned: torch.Tensor | None = None  # int64 [at least what was uploaded last]
        self._words = torch.empty(0, dtype=torch.int64, device=device)  # its counterpart on the device
        self._report: torch.Tensor | None = None  # int64 [at least what was downloaded last], pinned
        self._uploaded = DeviceWork(None)

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

    def upload(self, words: npt.NDArray[np.int64]) -> torch.Tensor:
        """A copy on the device, int64 [n], without waiting for it; valid until the next upload."""
        if self._stream is None:
            return torch.from_numpy(words.copy())
        if self._pinned is None or self._pinned.numel() < words.size:
            self._pinned = torch.empty(2 * words.size, dtype=torch.int64, pin_memory=True)
            self._words = torch.empty(2 * words.size, dtype=torch.int64, device=self._device)
        self._uploaded.wait()  # for the upload before, whose numbers are about to be overwritten
        self._pinned.numpy()[: words.size] = words
        on_device = self._words[: words.size]
        on_device.copy_(self._pinned[: words.size], non_blocking=True)
        self._uploaded = self.mark()
        return on_device

    def download(self, parts: Sequence[torch.Tensor]) -> npt.NDArray[np.int64]:
        """Tensors of int64, one after the other, in host memory; waits for what was queued before, and nothing else."""
        num_words = sum(part.numel() for part in parts)
        if self._report is None or self._report.numel() < num_words:
            self._report = torch.empty(num_words, dtype=torch.int64, pin_memory=self._stream is not None)
        first = 0
        for part in parts:
            self._report[first : first + part.numel()].copy_(part, non_blocking=True)
            first += part.numel()
        self.mark().wait()
        return self._report[:num_words].numpy().copy()
