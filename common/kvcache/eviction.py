"""Which cached block goes first: the one that was let go of longest ago.

Time is a logical clock, so the same calls always evict the same blocks. Knows nothing of hashes, trees or references.
"""

from __future__ import annotations

import heapq

_MIN_STALE_ENTRIES = 64  # below this a rebuild costs more than it saves


class EvictionQueue:
    """Candidate blocks by the time at which they were last used.

    Discarding leaves a stale heap entry behind, dropped when popped or when stale entries outnumber the live ones:
    every operation is O(log n) amortised.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, int]] = []  # (last used, serial, block)
        self._serials: dict[int, int] = {}  # block -> serial of its live entry
        self._next_serial = 0

    def __len__(self) -> int:
        return len(self._serials)

    def __contains__(self, block_id: int) -> bool:
        return block_id in self._serials

    def push(self, block_id: int, last_used: int) -> None:
        """Make a block a candidate; one that is already queued takes its new place."""
        serial = self._next_serial
        self._next_serial += 1
        self._serials[block_id] = serial
        heapq.heappush(self._heap, (last_used, serial, block_id))
        self._drop_stale_entries()

    def discard(self, block_id: int) -> None:
        """The block is no candidate any more; no effect if it is none."""
        self._serials.pop(block_id, None)

    def pop(self) -> int | None:
        """Remove and return the candidate that goes first; None if there is none."""
        while self._heap:
            _, serial, block_id = heapq.heappop(self._heap)
            if self._serials.get(block_id) == serial:
                del self._serials[block_id]
                return block_id
        return None

    def push_and_pop(self, block_id: int, last_used: int) -> int:
        """`push` a block that is not queued, then `pop`: much cheaper than the two if it goes first, as a parent mostly
        does that becomes a leaf while its prefix is evicted."""
        if not self._heap or last_used < self._heap[0][0]:
            return block_id
        self.push(block_id, last_used)
        first = self.pop()
        assert first is not None, "one was pushed just now"
        return first

    def _drop_stale_entries(self) -> None:
        if len(self._heap) > 2 * len(self._serials) + _MIN_STALE_ENTRIES:
            self._heap = [entry for entry in self._heap if self._serials.get(entry[2]) == entry[1]]
            heapq.heapify(self._heap)
