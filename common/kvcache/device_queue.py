"""Where the copies of one storage run: a stream of its own on a GPU, the calling thread on a CPU.

Nothing here waits for the whole device, so a step that computes meanwhile is not held up. Knows no blocks.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

_BEFORE_STEPS: Final = -1  # a stream's priority: a copy takes its turn before what a step has queued


class DeviceWork:
    """Copies that were queued. Everything they touch is lent until they are complete.

    `outcome` [none] is called when they are, and raises if they came to nothing.
    """

    def __init__(self, event: torch.cuda.Event | None, outcome: Callable[[], None] | None = None) -> None:
        self._event = event
        self._outcome = outcome

    def done(self) -> bool:
        """Whether everything is complete; never blocks."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Block this thread until everything is complete; other threads of the process run on."""
        if self._event is not None:
            self._event.synchronize()

    def result(self) -> None:
        """Raise what the copies found, once they are complete. Call it once."""
        if self._outcome is not None:
            self._outcome()


class DeviceQueue:
    """Work queued under `entered` runs in order. One thread at a time may use it.

    Small numbers go to the device and come back through pinned memory that is kept, as pinning anew costs more than
    everything else that is done for a slot.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=_BEFORE_STEPS) if on_gpu else None  # type: ignore[no-untyped-call]
        self._pinned: deque[tuple[DeviceWork, torch.Tensor]] = deque()  # int64, and what reads or writes it still
        self._words = torch.empty(0, dtype=torch.int64, device=device)  # what was uploaded last

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """What is launched inside runs on this queue, on its device."""
        stream: AbstractContextManager[object] = contextlib.nullcontext()
        if self._stream is not None:
            stream = torch.cuda.stream(self._stream)
        with torch.inference_mode(), stream:
            yield

    def mark(self, outcome: Callable[[], None] | None = None) -> DeviceWork:
        """All that was queued until now."""
        return DeviceWork(None if self._stream is None else self._stream.record_event(), outcome)

    def upload(self, words: npt.NDArray[np.int64]) -> torch.Tensor:
        """A copy on the device, int64 [n], without waiting for it; valid until the next upload."""
        if self._stream is None:
            return torch.from_numpy(words.copy())
        if self._words.numel() < words.size:
            self._words = torch.empty(2 * words.size, dtype=torch.int64, device=self._device)
        pinned = self._pinned_memory(words.size)
        pinned.numpy()[: words.size] = words
        on_device = self._words[: words.size]
        on_device.copy_(pinned[: words.size], non_blocking=True)
        self._pinned.append((self.mark(), pinned))
        return on_device

    def download(self, words: torch.Tensor, use: Callable[[npt.NDArray[np.int64]], None]) -> DeviceWork:
        """Queue a copy of int64 [n] to the host: `use` gets it as the outcome of all that was queued until now."""
        if self._stream is None:
            return DeviceWork(None, lambda: use(words.numpy()))
        pinned = self._pinned_memory(words.numel())
        pinned[: words.numel()].copy_(words, non_blocking=True)
        num_words = words.numel()

        def outcome() -> None:
            self._pinned.append((DeviceWork(None), pinned))
            use(pinned[:num_words].numpy())

        return self.mark(outcome)

    def _pinned_memory(self, num_words: int) -> torch.Tensor:
        """int64 [at least num_words] that nothing uses any more."""
        for _ in range(len(self._pinned)):
            work, pinned = self._pinned.popleft()
            if pinned.numel() >= num_words and work.done():
                return pinned
            self._pinned.append((work, pinned))
        return torch.empty(max(64, 1 << (num_words - 1).bit_length()), dtype=torch.int64, pin_memory=True)
