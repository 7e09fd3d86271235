"""What the fronts of both workers are: a name, a model, counters, and ranks that are started again when they are lost.

Knows no RPC, no queue and no block.
"""

from __future__ import annotations

import secrets
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

from baton.v1 import worker_pb2

from common.errors import Unavailable, WorkerDraining
from common.telemetry.tracing import Tracing
from common.worker.free_port import free_ports, require_free
from common.worker.kv_address import fixed_ports, rank_urls
from common.worker.rank_group import RankGroup
from common.worker.rank_messages import StartRank
from common.worker.worker_config import WorkerConfig
from common.worker.worker_metrics import WorkerMetrics
from common.worker.worker_model import WorkerModel

StartGroup = Callable[[str, Sequence[StartRank], float], Awaitable[RankGroup]]
ConfigT = TypeVar("ConfigT", bound=WorkerConfig)
MetricsT = TypeVar("MetricsT", bound=WorkerMetrics)


class WorkerFront(ABC, Generic[ConfigT, MetricsT]):
    """Base of a worker. Use `run` for its life. `on_change` is told whenever the status may have changed;
    `start_ranks` starts a group of `rank_module` (see `RankGroup.start`). `tracing` may be set before anything runs."""

    role: worker_pb2.WorkerRole.ValueType
    rank_module: str
    captures_steps = False  # see StartRank
    captured_chunk_tokens = 0  # see StartRank
    ranks_listen = False  # for connections of other workers' ranks
    corrupt_every = 0  # fault injection for tests; see StartRank

    def __init__(
        self,
        config: ConfigT,
        model: WorkerModel,
        counters: MetricsT,
        on_change: Callable[[], None],
        start_ranks: StartGroup,
    ) -> None:
        self.config = config
        self.model = model
        self.num_blocks = config.num_blocks_of(model)
        config.check_slots(model)
        self.incarnation = secrets.token_hex(8)
        self.counters = counters
        self.counters.watch(self.status)
        self.tracing = Tracing()
        self.draining = False
        self.on_change = on_change
        self._start_ranks = start_ranks
        self._num_starts = 0

    @property
    @abstractmethod
    def max_step_tokens(self) -> int:
        """The largest step."""

    @property
    @abstractmethod
    def has_ranks(self) -> bool:
        """Whether the ranks are ready."""

    @abstractmethod
    async def run(self) -> None:
        """Keep ranks running until cancelled. Raises what the first start failed with."""

    @abstractmethod
    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is under way; False if something is when the time is up."""

    @abstractmethod
    def status(self) -> worker_pb2.WorkerStatus:
        """See the proto."""

    async def refresh(self) -> None:
        """Fetch what the status should have and only the ranks know, if they answer soon. Never raises."""

    def listens_on(self, port: int) -> None:
        """The server stands."""

    def end_streams(self) -> None:
        """The worker stops: end the streams that would go on for ever."""

    @property
    def is_ready(self) -> bool:
        """Whether something new is taken."""
        return self.has_ranks and not self.draining

    def require_ready(self) -> None:
        """Raises `Unavailable` while nothing new is taken."""
        if self.draining:
            raise WorkerDraining(f"{self.config.worker_id} is draining")
        if not self.has_ranks:
            raise Unavailable(f"{self.config.worker_id} is starting its ranks")

    def drain(self) -> None:
        """Take nothing new; what is under way goes on."""
        self.draining = True
        self.on_change()

    async def start_group(self) -> RankGroup:
        """Start the ranks once more. Raises what `RankGroup.start` raises, and `FailedPrecondition` if a port that they
        are to listen on is taken at the first start."""
        if self.ranks_listen and self._num_starts == 0:
            host, ports = fixed_ports(self.config.kv_url, self.config.tp_size)
            for port in ports:
                require_free(host, port)
        self._num_starts += 1
        return await self._start_ranks(self.rank_module, self._start_messages(), self.config.start_timeout_s)

    def peer_name(self, rank: int) -> str:
        """Another name for each start: what a lost rank had in flight can never be taken for its successor's."""
        return f"{self.config.worker_id}/{self.incarnation}/{self._num_starts}/{rank}"

    def base_status(self) -> worker_pb2.WorkerStatus:
        """A status without any load."""
        return worker_pb2.WorkerStatus(
            worker_id=self.config.worker_id,
            incarnation=self.incarnation,
            role=self.role,
            state=self._state(),
            layout_fingerprint=self.model.fingerprint,
            model=self.model.name,
            model_digest=self.model.digest,
            block_size=self.config.block_size,
            tp_size=self.config.tp_size,
            max_sequence_tokens=self.num_blocks * self.config.block_size + 1,  # the last token needs no block
            counters=self.counters.snapshot(),
        )

    def _state(self) -> worker_pb2.WorkerState.ValueType:
        if self.draining:
            return worker_pb2.WORKER_STATE_DRAINING
        return worker_pb2.WORKER_STATE_READY if self.has_ranks else worker_pb2.WORKER_STATE_STARTING

    def _start_messages(self) -> list[StartRank]:
        config = self.config
        urls = rank_urls(config.kv_url, config.tp_size)
        (port,) = free_ports(1)  # where rank 0 waits for the others
        return [
            StartRank(
                rank=rank,
                tp_size=config.tp_size,
                group_address=f"127.0.0.1:{port}",
                model_dir=str(config.model),
                device=config.device,
                dtype=config.dtype,
                num_blocks=self.num_blocks,
                block_size=config.block_size,
                max_rows=config.max_rows,
                max_step_tokens=self.max_step_tokens,
                num_slots=config.num_slots,
                slot_bytes=config.slot_bytes,
                transport_url=urls[rank],
                transport_progress=config.progress,
                peer_name=self.peer_name(rank),
                corrupt_every=self.corrupt_every,
                first_device=config.first_device,
                random_weights=config.random_weights,
                captures_steps=self.captures_steps,
                captured_chunk_tokens=self.captured_chunk_tokens,
                listens=self.ranks_listen,
            )
            for rank in range(config.tp_size)
        ]
