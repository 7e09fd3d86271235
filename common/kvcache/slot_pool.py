"""Staging slots of one decode worker: who may write where, in lock-step (slot i on every rank).

            request / grant_waiting            release
    FREE ───────────────────────▶ GRANTED ─────────────▶ FREE
                                     │ quarantine              ▲
                                     ▼                         │ end_quarantine of the last rank in doubt
                                 QUARANTINED ──────────────────┘

A slot in quarantine may still be written by a transfer that could not be cancelled: it is not granted until
every rank in doubt has closed and drained the connection. Pure: knows no memory, no transport and no event
loop.
"""

from __future__ import annotations

import enum
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable
from typing import Generic, TypeVar

from common.errors import InternalError, InvalidArgument, ResourceExhausted
from common.kvcache.grant import MAX_SLOTS, NONCE_BITS, NUM_GENERATIONS, SlotHandle

WaiterT = TypeVar("WaiterT", bound=Hashable)


class SlotState(enum.Enum):
    """Where a slot is; the same on all ranks."""

    FREE = "free"
    GRANTED = "granted"
    QUARANTINED = "quarantined"


class SlotPool(Generic[WaiterT]):
    """`num_slots` slots on each of `num_ranks` ranks, and a bounded first-come queue of waiters for them.

    `nonce` is a source of unpredictable integers; the low 32 bits are used.
    """

    def __init__(self, num_slots: int, num_ranks: int, max_waiters: int, nonce: Callable[[], int]) -> None:
        if not 1 <= num_slots <= MAX_SLOTS:
            raise InvalidArgument("num_slots", num_slots, f"must be between 1 and {MAX_SLOTS}")
        if num_ranks < 1:
            raise InvalidArgument("num_ranks", num_ranks, "must be at least 1")
        self.num_slots = num_slots
        self.num_ranks = num_ranks
        self.max_waiters = max_waiters
        self._nonce = nonce
        self._states = [SlotState.FREE] * num_slots
        self._handles: list[SlotHandle | None] = [None] * num_slots  # the latest use of each slot
        self._free = deque(range(num_slots))  # a queue: the slot freed first rests longest
        self._in_doubt: dict[int, set[int]] = {}  # quarantined slot -> ranks that have not drained
        self._waiters: dict[WaiterT, None] = {}  # first come, first served, and O(1) to leave

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_quarantined(self) -> int:
        return len(self._in_doubt)

    @property
    def num_granted(self) -> int:
        return self.num_slots - len(self._free) - len(self._in_doubt)

    @property
    def num_waiting(self) -> int:
        return len(self._waiters)

    def request(self, waiter: WaiterT) -> SlotHandle | None:
        """A slot on every rank now, or None and a place in the queue; see `grant_waiting`.

        Raises `ResourceExhausted`, without effect, if the queue is full.
        """
        if waiter in self._waiters:
            raise InternalError(f"{waiter!r} already waits for a slot")
        if self._free and not self._waiters:
            return self._grant()
        if len(self._waiters) >= self.max_waiters:
            raise ResourceExhausted(f"{self.max_waiters} chunks already wait for a staging slot")
        self._waiters[waiter] = None
        return None

    def cancel(self, waiter: WaiterT) -> bool:
        """Leave the queue. False if the waiter is not in it (granted, or never there)."""
        if waiter not in self._waiters:
            return False
        del self._waiters[waiter]
        return True

    def grant_waiting(self) -> list[tuple[WaiterT, SlotHandle]]:
        """Give free slots to waiters in order. Call after `release`, `end_quarantine` and `cancel`."""
        granted = []
        while self._free and self._waiters:
            waiter = next(iter(self._waiters))
            del self._waiters[waiter]
            granted.append((waiter, self._grant()))
        return granted

    def release(self, handle: SlotHandle) -> bool:
        """The slot is free again: all bytes arrived, or no byte can arrive any more. False, without effect,
        if the handle is not the granted use of its slot (released before, or in quarantine)."""
        if not self._is_in(handle, SlotState.GRANTED):
            return False
        self._set_free(handle.slot)
        return True

    def quarantine(self, handle: SlotHandle, ranks: Collection[int] | None = None) -> bool:
        """Late writes may still reach the slot on `ranks` (default: all). Name them all in one call.

        False, without effect, if the handle is not the granted use of its slot.
        """
        doubtful = set(range(self.num_ranks) if ranks is None else ranks)
        if not doubtful <= set(range(self.num_ranks)) or not doubtful:
            raise InternalError(f"quarantine on ranks {sorted(doubtful)} of {self.num_ranks}")
        if not self._is_in(handle, SlotState.GRANTED):
            return False
        self._states[handle.slot] = SlotState.QUARANTINED
        self._in_doubt[handle.slot] = doubtful
        return True

    def end_quarantine(self, handle: SlotHandle, rank: int | None = None) -> bool:
        """`rank` (default: every rank) has drained. True if it was the last: the slot is free now."""
        if not self._is_in(handle, SlotState.QUARANTINED):
            return False
        doubtful = self._in_doubt[handle.slot]
        doubtful.difference_update(range(self.num_ranks) if rank is None else {rank})
        if doubtful:
            return False
        del self._in_doubt[handle.slot]
        self._set_free(handle.slot)
        return True

    def check_integrity(self) -> None:
        """Verify free + granted + quarantined = total and that the queues agree with the states."""
        counts = Counter(self._states)
        if len(set(self._free)) != len(self._free) or counts[SlotState.FREE] != len(self._free):
            raise InternalError("the free queue differs from the free slots")
        if any(self._states[slot] is not SlotState.FREE for slot in self._free):
            raise InternalError("a slot in the free queue is not free")
        if counts[SlotState.GRANTED] != self.num_granted or sum(counts.values()) != self.num_slots:
            raise InternalError("free + granted + quarantined differs from the total")
        if counts[SlotState.QUARANTINED] != len(self._in_doubt) or not all(self._in_doubt.values()):
            raise InternalError("a slot is in quarantine for no rank, or in doubt outside quarantine")
        if any(self._states[slot] is not SlotState.QUARANTINED for slot in self._in_doubt):
            raise InternalError("a slot in doubt is not in quarantine")
        if len(self._waiters) > self.max_waiters:
            raise InternalError("more waiters than the queue may hold")

    def _grant(self) -> SlotHandle:
        slot = self._free.popleft()
        last = self._handles[slot]
        generation = 0 if last is None else (last.generation + 1) % NUM_GENERATIONS
        handle = SlotHandle(slot, generation, self._nonce() & (1 << NONCE_BITS) - 1)
        self._states[slot] = SlotState.GRANTED
        self._handles[slot] = handle
        return handle

    def _set_free(self, slot: int) -> None:
        self._states[slot] = SlotState.FREE
        self._free.append(slot)

    def _is_in(self, handle: SlotHandle, state: SlotState) -> bool:
        return self._handles[handle.slot] == handle and self._states[handle.slot] is state
