"""Waiting for a staging slot, to send from or to receive into: the event loop's side of `SlotPool`.

Knows no transport and no blocks.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Collection

from common.errors import Unavailable
from common.kvcache.grant import SlotHandle
from common.kvcache.slot_pool import SlotPool
from common.worker.rank_group import Operation
from common.worker.rank_messages import SlotDrained


class StagingSlots:
    """The slots of one rank group; a new group has new ones. `on_change` is told whenever a count may have changed."""

    def __init__(
        self, num_slots: int, num_ranks: int, max_waiters: int, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self._on_change = on_change
        self._pool: SlotPool[asyncio.Future[SlotHandle]] = SlotPool(
            num_slots, num_ranks, max_waiters, nonce=lambda: secrets.randbits(32)
        )
        self._waiters: set[asyncio.Future[SlotHandle]] = set()

    @property
    def num_free(self) -> int:
        return self._pool.num_free

    @property
    def num_in_use(self) -> int:
        return self._pool.num_granted

    @property
    def num_quarantined(self) -> int:
        return self._pool.num_quarantined

    @property
    def num_waiting(self) -> int:
        return self._pool.num_waiting

    async def acquire(self) -> SlotHandle:
        """A slot on every rank, first come, first served. Cancelling it leaves nothing behind.

        Raises `ResourceExhausted` if too many wait, `Unavailable` if the ranks are lost meanwhile.
        """
        turn: asyncio.Future[SlotHandle] = asyncio.get_running_loop().create_future()
        handle = self._pool.request(turn)
        if handle is not None:
            return handle
        self._waiters.add(turn)
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                self.release(turn.result())
            elif self._pool.cancel(turn):
                self._grant()
            raise
        finally:
            self._waiters.discard(turn)

    def release(self, handle: SlotHandle) -> None:
        """No byte can arrive in the slot any more."""
        self._pool.release(handle)
        self._grant()

    def quarantine(self, handle: SlotHandle, ranks: Collection[int]) -> None:
        """Bytes may still arrive on these ranks: nobody gets the slot until each has drained."""
        self._pool.quarantine(handle, ranks)
        self._on_change()

    async def await_drained(self, handle: SlotHandle, rank: int, doubtful: Collection[Operation]) -> None:
        """End a rank's part of a quarantine once all its doubtful operations are drained.

        Raises `Unavailable` if the rank is lost first: then the slot is gone with it.
        """
        for operation in doubtful:
            while not isinstance(await operation.reply(), SlotDrained):
                pass
            operation.close()
        self._pool.end_quarantine(handle, rank)
        self._grant()

    def close(self, reason: str) -> None:
        """The ranks are gone: whoever waits gets `Unavailable`."""
        for turn in self._waiters:
            self._pool.cancel(turn)
            if not turn.done():
                turn.set_exception(Unavailable(reason))

    def _grant(self) -> None:
        while granted := self._pool.grant_waiting():
            for turn, handle in granted:
                if turn.done():
                    self._pool.release(handle)  # cancelled in this very moment: the slot goes to the next
                else:
                    turn.set_result(handle)
        self._on_change()
