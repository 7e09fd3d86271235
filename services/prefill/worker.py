"""The prefill worker as a whole: its ranks, what runs on them, and its status. Knows no RPC.

A `Session` is what one incarnation of the ranks can do: engine, prefix cache and send slots live and die with it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from baton.v1 import worker_pb2

from common import errors
from common.kvcache.kv_cache_manager import KVCacheManager
from common.worker.rank_group import RankGroup
from common.worker.step_watchdog import StepWatchdog
from common.worker.supervisor import RankSupervisor
from common.worker.worker_front import StartGroup, WorkerFront
from common.worker.worker_model import WorkerModel
from services.prefill.config import PrefillConfig
from services.prefill.engine import PrefillEngine
from services.prefill.handoff_setup import HandoffSetup
from services.prefill.metrics import PrefillMetrics
from services.prefill.scheduler import Scheduler
from services.prefill.sends import Sends

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Session:
    """One incarnation of the ranks."""

    ranks: RankGroup
    engine: PrefillEngine
    sends: Sends
    setup: HandoffSetup


class PrefillWorker(WorkerFront[PrefillConfig, PrefillMetrics]):
    """See `WorkerFront`. `session` is what requests run on."""

    role = worker_pb2.WORKER_ROLE_PREFILL
    rank_module = "services.prefill.rank"

    def __init__(
        self,
        config: PrefillConfig,
        model: WorkerModel,
        on_change: Callable[[], None],
        start_ranks: StartGroup = RankGroup.start,
    ) -> None:
        super().__init__(config, model, PrefillMetrics(), self._wake, start_ranks)
        self.corrupt_every = config.corrupt_every
        self.captured_chunk_tokens = config.captured_tokens
        self._tell_change = on_change
        self._changed = asyncio.Event()
        self._session: Session | None = None
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def max_step_tokens(self) -> int:
        return self.config.max_step_tokens

    @property
    def has_ranks(self) -> bool:
        return self._session is not None

    @property
    def session(self) -> Session:
        """What takes requests. Raises `Unavailable` while nothing does."""
        self.require_ready()
        assert self._session is not None
        return self._session

    async def wait_idle(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s):
                while self._session is not None and self._session.engine.num_jobs:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        supervisor = RankSupervisor(
            self.start_group, self._begin_session, self._lose_session, hang_timeout_s=self.config.step_timeout_s
        )
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                await supervisor.run()
        finally:
            self._end_session(errors.WorkerDraining("the worker is stopping"))

    def status(self) -> worker_pb2.WorkerStatus:
        status = self.base_status()
        session = self._session
        if session is None:
            status.num_blocks_free = self.num_blocks
            status.num_slots_free = self.config.num_slots
            return status
        scheduler, blocks = session.engine.scheduler, session.engine.scheduler.kv.stats()
        status.num_waiting = scheduler.num_waiting
        status.num_running = session.engine.num_jobs - scheduler.num_waiting
        status.num_waiting_tokens = scheduler.num_waiting_tokens
        status.load_unit_ns = round(scheduler.token_s * 1e9)
        status.num_blocks_free, status.num_blocks_cached = blocks.num_free, blocks.num_cached
        status.num_blocks_held = blocks.num_held
        status.num_slots_free = session.sends.slots.num_free
        status.num_slots_in_use = session.sends.slots.num_in_use
        status.num_slots_quarantined = session.sends.slots.num_quarantined
        status.num_grants_waiting = self.counters.num_offered
        status.rank_pids.extend(session.ranks.pids)
        return status

    def _wake(self) -> None:
        self._changed.set()
        self._tell_change()

    def _begin_session(self, ranks: RankGroup) -> None:
        config = self.config
        kv = KVCacheManager(self.num_blocks, config.block_size, config.prefix_cache)
        scheduler = Scheduler(kv, config.scheduler_limits, self.model.digest)
        setup = HandoffSetup(
            worker_id=config.worker_id,
            incarnation=self.incarnation,
            layout=self.model.layout,
            layout_fingerprint=self.model.fingerprint,
            rank_peer_names=tuple(self.peer_name(rank) for rank in range(config.tp_size)),
            connection_key=secrets.token_bytes(32),
            slot_bytes=config.slot_bytes,
            last_chunk_bytes=config.last_chunk_bytes,
            max_chunks_in_flight=config.max_chunks_in_flight,
            max_chunk_resends=config.max_chunk_resends,
            connect_timeout_s=config.connect_timeout_s,
        )
        watchdog = StepWatchdog(ranks, config.step_timeout_s)
        engine = PrefillEngine(ranks, watchdog, scheduler, self.counters, self.on_change)
        self._session = Session(ranks, engine, Sends(ranks, config.num_slots, self.counters, self.on_change), setup)
        assert self._tasks is not None
        self._tasks.create_task(_run_session(self._session))
        _log.info("%s is ready: %d ranks, layout %s", config.worker_id, config.tp_size, self.model.fingerprint)
        self.on_change()

    def _end_session(self, error: errors.Unavailable) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.engine.fail_all(error)
        self.on_change()

    def _lose_session(self, reason: str) -> None:
        self.counters.inc("ranks_lost")
        self._end_session(errors.RanksLost(reason))


async def _run_session(session: Session) -> None:
    """Ends with the ranks. An invariant that is broken (`InternalError`) goes on to the process's end."""
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(session.sends.run())
            await session.engine.run()
    except* errors.Unavailable as lost:
        _log.debug("the engine ended: %s", lost.exceptions[0])
