"""Where the copies of one storage run: a stream of its own on a GPU, the calling thread on a CPU.

Nothing here waits for the whole device, so a step that computes meanwhile is not held up. Knows no blocks.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, cast

import torch

_BEFORE_STEPS: Final = -1  # a stream's priority: a copy takes its turn before what a step has queued
_MIN_WORDS: Final = 64  # of a parcel
_WORD_BYTES: Final = 8


class Parcel:
    """Numbers that go to the device for one piece of work, and those that the device writes back.

    Lent until that work is done. host: what the caller fills in, a view of bytes in pinned memory; words: int64
    [capacity], where `send` puts them on the device; report: int64 [num_report_words] in pinned memory, which kernels
    write as if it were the device's: what they wrote is there when the work is done.
    """

    def __init__(self, num_words: int, num_report_words: int, device: torch.device) -> None:
        capacity = max(_MIN_WORDS, 1 << (num_words - 1).bit_length())
        on_gpu = device.type == "cuda"
        with torch.inference_mode(False):  # a tensor made inside could not be written outside
            self._pinned = torch.zeros(capacity, dtype=torch.int64, pin_memory=on_gpu)
            self.report = torch.zeros(num_report_words, dtype=torch.int64, pin_memory=on_gpu)
            self.words = torch.empty_like(self._pinned, device=device) if on_gpu else self._pinned
        self.capacity = capacity
        self.host = self._pinned.numpy().data.cast("B")
        self._report = self.report.numpy()

    def send(self) -> None:
        """Queue the copy to the device, without waiting for it. Under `DeviceQueue.entered`."""
        if self.words is not self._pinned:
            self.words.copy_(self._pinned, non_blocking=True)

    def report_bytes(self) -> bytes:
        """What the device wrote, once it is done."""
        return self._report.tobytes()


class DeviceWork:
    """Copies that were queued. Everything they touch is lent until they are complete.

    `outcome` [none] is called with what the device wrote into the report of `parcel`, and raises if the copies came to
    nothing.
    """

    def __init__(
        self,
        event: torch.cuda.Event | None,
        parcel: Parcel | None = None,
        outcome: Callable[[bytes], None] | None = None,
    ) -> None:
        self._event = event
        self._parcel = parcel
        self._outcome = outcome
        self._report = b""

    def done(self) -> bool:
        """Whether everything is complete; never blocks."""
        return self._event is None or bool(self._event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Block this thread until everything is complete; other threads of the process run on."""
        if self._event is not None:
            self._event.synchronize()

    def result(self) -> None:
        """Raise what the copies found, once they are complete."""
        if self._outcome is not None:
            self.take_parcel()
            self._outcome(self._report)

    def take_parcel(self) -> Parcel | None:
        """The parcel, no longer needed here, as its report is kept; for work that is complete."""
        parcel, self._parcel = self._parcel, None
        if parcel is not None and self._outcome is not None:
            self._report = parcel.report_bytes()
        return parcel


class DeviceQueue:
    """Work queued under `entered` runs in order. One thread at a time may use it; which one does not matter.

    Parcels are kept, as pinning memory anew costs more than everything else that is done for a slot.
    """

    def __init__(self, device: torch.device, num_report_words: int = 0) -> None:
        self._device = device
        self._num_report_words = num_report_words
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device, priority=_BEFORE_STEPS) if on_gpu else None  # type: ignore[no-untyped-call]
        self._lent: deque[tuple[DeviceWork, Parcel]] = deque()  # oldest first, which is done first

    def entered(self) -> AbstractContextManager[object]:
        """What is launched inside runs on this queue, on its device. Not to be nested."""
        if self._stream is None:
            return contextlib.nullcontext()
        if hasattr(self._stream, "__enter__"):  # changes stream and device in a fraction of the time
            return cast(AbstractContextManager[object], self._stream)
        return torch.cuda.stream(self._stream)

    def parcel(self, num_words: int) -> Parcel:
        """One with room for so many words that nothing uses any more. Under `entered`."""
        if self._lent and self._lent[0][0].done():
            work, parcel = self._lent.popleft()
            work.take_parcel()
            if parcel.capacity >= num_words:
                return parcel
        return Parcel(num_words, self._num_report_words, self._device)

    def mark(self, parcel: Parcel | None = None, outcome: Callable[[bytes], None] | None = None) -> DeviceWork:
        """All that was queued until now, which `parcel`, if there is one, was for."""
        event = None if self._stream is None else self._stream.record_event()
        work = DeviceWork(event, parcel, outcome)
        if parcel is not None:
            self._lent.append((work, parcel))
        return work
