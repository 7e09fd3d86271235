"""The prefill worker as a whole: its ranks, what runs on them, and its status. Knows no RPC.

A `Session` is what one incarnation of the ranks can do: engine, prefix cache and send slots live and die with it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from baton.v1 import worker_pb2

from common import errors
from common.kvcache.kv_cache_manager import KVCacheManager
from common.kvcache.layout import heads_of_rank
from common.telemetry.counters import Counters
from common.worker.rank_group import RankGroup
from common.worker.rank_messages import StartRank
from common.worker.supervisor import RankSupervisor
from common.worker.worker_model import WorkerModel
from services.prefill.config import PrefillConfig
from services.prefill.engine import PrefillEngine
from services.prefill.handoff import HandoffSetup
from services.prefill.scheduler import Scheduler
from services.prefill.sends import Sends

_log = logging.getLogger(__name__)
RANK_MODULE = "services.prefill.rank"

StartGroup = Callable[[str, Sequence[StartRank], float], Awaitable[RankGroup]]

COUNTERS = {
    "steps": "Steps computed.",
    "compute_ns": "Time of the ranks in steps, nanoseconds.",
    "prompt_tokens": "Tokens of admitted prompts.",
    "cached_tokens": "Tokens of admitted prompts that were in the prefix cache.",
    "requests_completed": "Prefill calls that ended well.",
    "requests_failed": "Prefill calls that ended with an error.",
    "requests_cancelled": "Prefill calls whose caller went away.",
    "requests_refused": "Prefill calls that were turned away before anything was computed.",
    "blocks_shipped": "Blocks that decode workers verified.",
    "blocks_reused": "Blocks that decode workers held already.",
    "bytes_shipped": "Bytes sent to decode workers, headers and repetitions included.",
    "chunks_resent": "Chunks that were offered again.",
    "slots_quarantined": "Send slots whose last send was in doubt.",
    "ranks_lost": "Incarnations of the ranks that died.",
}


@dataclass(slots=True)
class Session:
    """One incarnation of the ranks."""

    ranks: RankGroup
    engine: PrefillEngine
    sends: Sends
    setup: HandoffSetup


class PrefillWorker:
    """Use `run` for its life. `on_change` is told whenever the status may have changed; `start_group` starts ranks."""

    def __init__(
        self,
        config: PrefillConfig,
        model: WorkerModel,
        on_change: Callable[[], None],
        start_group: StartGroup = RankGroup.start,
    ) -> None:
        self.config = config
        self.model = model
        self.num_blocks = _num_blocks(config, model)
        self.incarnation = secrets.token_hex(8)
        self.counters = Counters(COUNTERS)
        self.counters.set_gauges(self._gauges)
        self.draining = False
        self._tell_change = on_change
        self._start_ranks = start_group
        self._changed = asyncio.Event()
        self._session: Session | None = None
        self._num_starts = 0
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def session(self) -> Session:
        """What takes requests. Raises `Unavailable` while nothing does."""
        if self.draining:
            raise errors.Unavailable(f"{self.config.worker_id} is draining")
        if self._session is None:
            raise errors.Unavailable(f"{self.config.worker_id} is starting its ranks")
        return self._session

    @property
    def is_ready(self) -> bool:
        """Whether requests are taken."""
        return self._session is not None and not self.draining

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until no request is under way; False if some are when the time is up."""
        try:
            async with asyncio.timeout(timeout_s):
                while self._session is not None and self._session.engine.num_jobs:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    async def run(self) -> None:
        """Keep ranks running until cancelled. Raises what the first start failed with."""
        supervisor = RankSupervisor(self._start_group, self._begin_session, self._lose_session)
        try:
            async with asyncio.TaskGroup() as tasks:
                self._tasks = tasks
                await supervisor.run()
        finally:
            self._end_session("the worker is stopping")

    def drain(self) -> None:
        """Take nothing new; what is under way goes on."""
        self.draining = True
        self._on_change()

    def status(self) -> worker_pb2.WorkerStatus:
        """See the proto."""
        status = worker_pb2.WorkerStatus(
            worker_id=self.config.worker_id,
            incarnation=self.incarnation,
            role=worker_pb2.WORKER_ROLE_PREFILL,
            state=self._state(),
            layout_fingerprint=self.model.fingerprint,
            model=self.model.name,
            block_size=self.config.block_size,
            tp_size=self.config.tp_size,
            counters=self.counters.snapshot(),
        )
        session = self._session
        if session is None:
            status.num_blocks_free = self.num_blocks
            status.num_slots_free = self.config.num_slots
            return status
        scheduler, blocks = session.engine.scheduler, session.engine.scheduler.kv.stats()
        status.num_waiting = scheduler.num_waiting
        status.num_running = session.engine.num_jobs - scheduler.num_waiting
        status.num_waiting_tokens = scheduler.num_waiting_tokens
        status.num_blocks_free, status.num_blocks_cached = blocks.num_free, blocks.num_cached
        status.num_blocks_held = blocks.num_held
        status.num_slots_free = session.sends.num_slots_free
        status.num_slots_in_use = session.sends.num_slots_in_use
        status.num_slots_quarantined = session.sends.num_slots_quarantined
        status.rank_pids.extend(session.ranks.pids)
        return status

    def _on_change(self) -> None:
        self._changed.set()
        self._tell_change()

    def _state(self) -> worker_pb2.WorkerState.ValueType:
        if self.draining:
            return worker_pb2.WORKER_STATE_DRAINING
        return worker_pb2.WORKER_STATE_STARTING if self._session is None else worker_pb2.WORKER_STATE_READY

    def _gauges(self) -> dict[str, float]:
        status = self.status()
        names = [name for name in worker_pb2.WorkerStatus.DESCRIPTOR.fields_by_name if name.startswith("num_")]
        return {name: float(getattr(status, name)) for name in names}

    async def _start_group(self) -> RankGroup:
        self._num_starts += 1
        return await self._start_ranks(RANK_MODULE, self._start_messages(), self.config.start_timeout_s)

    def _start_messages(self) -> list[StartRank]:
        config = self.config
        group_address = f"127.0.0.1:{_free_port()}"
        return [
            StartRank(
                rank=rank,
                tp_size=config.tp_size,
                group_address=group_address,
                model_dir=str(config.model),
                device=config.device,
                dtype=config.dtype,
                num_blocks=self.num_blocks,
                block_size=config.block_size,
                max_rows=config.max_rows,
                max_step_tokens=config.max_step_tokens,
                num_slots=config.num_slots,
                slot_bytes=config.slot_bytes,
                transport_url=config.transport_url,
                transport_progress=config.transport_progress,
                peer_name=self._peer_name(rank),
                corrupt_every=config.corrupt_every,
            )
            for rank in range(config.tp_size)
        ]

    def _peer_name(self, rank: int) -> str:
        """Another name for each start: what a lost rank had in flight can never be taken for its successor's."""
        return f"{self.config.worker_id}/{self.incarnation}/{self._num_starts}/{rank}"

    def _begin_session(self, ranks: RankGroup) -> None:
        config = self.config
        kv = KVCacheManager(self.num_blocks, config.block_size, config.prefix_cache)
        scheduler = Scheduler(kv, config.scheduler_limits, self.model.digest)
        setup = HandoffSetup(
            worker_id=config.worker_id,
            incarnation=self.incarnation,
            layout=self.model.layout,
            layout_fingerprint=self.model.fingerprint,
            rank_peer_names=tuple(self._peer_name(rank) for rank in range(config.tp_size)),
            slot_bytes=config.slot_bytes,
            max_chunks_in_flight=config.max_chunks_in_flight,
            max_chunk_resends=config.max_chunk_resends,
            connect_timeout_s=config.connect_timeout_s,
        )
        engine = PrefillEngine(ranks, scheduler, self.counters, self._on_change)
        self._session = Session(ranks, engine, Sends(ranks, config.num_slots, self.counters, self._on_change), setup)
        assert self._tasks is not None
        self._tasks.create_task(_run_session(self._session))
        _log.info("%s is ready: %d ranks, layout %s", config.worker_id, config.tp_size, self.model.fingerprint)
        self._on_change()

    def _end_session(self, reason: str) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.engine.fail_all(errors.Unavailable(reason))
        self._on_change()

    def _lose_session(self, reason: str) -> None:
        self.counters.inc("ranks_lost")
        self._end_session(reason)


async def _run_session(session: Session) -> None:
    """Ends with the ranks. An invariant that is broken (`InternalError`) goes on to the process's end."""
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(session.sends.run())
            await session.engine.run()
    except* errors.Unavailable as lost:
        _log.debug("the engine ended: %s", lost.exceptions[0])


def _num_blocks(config: PrefillConfig, model: WorkerModel) -> int:
    if not config.kv_bytes:
        return config.num_blocks
    block_bytes = model.layout.block_bytes(len(heads_of_rank(model.layout.num_kv_heads, config.tp_size, 0)))
    if config.kv_bytes < block_bytes:
        raise errors.InvalidArgument("kv_bytes", config.kv_bytes, f"a block has {block_bytes} bytes")
    return config.kv_bytes // block_bytes


def _free_port() -> int:
    """A port where rank 0 can wait for the others."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
