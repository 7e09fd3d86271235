"""What all hand-offs of a decode worker share: bounds, the ranks that stand now, their slots, and a parent for tasks.

Knows neither the messages of a hand-off nor their order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from dataclasses import dataclass

from common.errors import Unavailable
from common.kvcache.layout import KVLayout
from common.worker.rank_group import RankGroup
from common.worker.staging_slots import StagingSlots
from services.decode.engine import DecodeEngine
from services.decode.metrics import DecodeMetrics


@dataclass(frozen=True, slots=True)
class HandoffLimits:
    """Times and bounds of hand-offs. `grant_timeout_s`: for the bytes of one chunk. `connect_timeout_s`: for a prefill
    rank to appear on the transport. `cancel_timeout_s`: after which a receive that cannot be cancelled is in doubt.
    `open_grace_s`: for the router to open a sequence whose hand-off began before that.
    `max_chunk_resends`: offers of one chunk after its first; counted per chunk, so that a long prompt over a lossy
    path is not ended by a total. Prefill workers give up by their own setting of that name; this one bounds a peer
    that does not."""

    grant_timeout_s: float = 5.0
    connect_timeout_s: float = 5.0
    cancel_timeout_s: float = 0.5
    open_grace_s: float = 1.0
    max_waiting_chunks: int = 4096
    max_chunk_resends: int = 3


@dataclass(frozen=True, slots=True)
class HandoffSetup:
    """What is the same for every hand-off. `vocab_size` bounds the first token."""

    layout: KVLayout
    layout_fingerprint: str
    tp_size: int
    num_slots: int
    slot_bytes: int
    vocab_size: int
    limits: HandoffLimits


class HandoffContext:
    """`group` and `slots` are None while no ranks are ready."""

    def __init__(self, engine: DecodeEngine, setup: HandoffSetup, counters: DecodeMetrics) -> None:
        self.engine = engine
        self.setup = setup
        self.counters = counters
        self.group: RankGroup | None = None
        self.slots: StagingSlots | None = None
        self._tasks: asyncio.TaskGroup | None = None

    def on_ready(self, group: RankGroup) -> None:
        """New ranks, new slots."""
        setup = self.setup
        self.group = group
        self.slots = StagingSlots(setup.num_slots, setup.tp_size, setup.limits.max_waiting_chunks)

    def on_lost(self, reason: str) -> None:
        """The slots went with the ranks. Streams end as their sequences do."""
        if self.slots is not None:
            self.slots.close(reason)
        self.group = self.slots = None

    def require_ranks(self) -> tuple[RankGroup, StagingSlots]:
        """The ranks and slots of now. Raises `Unavailable` while there are none."""
        if self.group is None or self.slots is None:
            raise Unavailable("the ranks are being started")
        return self.group, self.slots

    async def run(self) -> None:
        """Parent of everything that outlives a stream, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                self._tasks = None

    def spawn(self, work: Coroutine[None, None, None]) -> asyncio.Task[None]:
        """Start what may outlive a stream. Raises `Unavailable` once the worker stops."""
        if self._tasks is None:
            work.close()
            raise Unavailable("the worker is stopping")
        return self._tasks.create_task(work)
