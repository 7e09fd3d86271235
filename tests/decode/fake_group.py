"""A rank group without processes: tests script what its ranks answer on the KV channel; steps are answered at once."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from common.worker.rank_group import Operation, RankGroup
from common.worker.rank_messages import (
    CancelDone,
    CancelReceive,
    FrontKVMessage,
    FrontStepMessage,
    GetTransportStats,
    PostReceive,
    RankReady,
    ReceiveDone,
    ReceivePosted,
    Scattered,
    SlotDrained,
    TransportStatsReply,
)
from common.worker.step_plan import AddRow, SampledToken, StepPlan, StepResult
from tests.decode.requests import token_of


class _Owner:
    def __init__(self) -> None:
        self.operations: dict[int, Operation] = {}


class FakeGroup(RankGroup):
    """`posts`: receives that were posted and not finished, by rank, in order."""

    def __init__(self, tp_size: int = 1) -> None:
        super().__init__()
        self.posts: asyncio.Queue[tuple[int, PostReceive]] = asyncio.Queue()
        self.refuse_posts: dict[int, tuple[str, str]] = {}  # rank -> error
        self.cancel_outcome = "drained"
        self.hold_cancels = False
        self.holds_posts = False  # nothing is said of them
        self.hangs = False  # steps are not answered
        self.kv_hangs = False  # signs of life are not given
        self.num_pings = 0
        self.num_cancels = 0
        self.stale_messages = 0
        self._held_cancels: list[CancelReceive] = []
        self._owner = _Owner()
        self._tp_size = tp_size
        self._seeds: dict[int, int] = {}

    @property
    def infos(self) -> list[RankReady]:
        return [RankReady(rank, f"inproc://{rank}", "layout", 0, 0) for rank in range(self._tp_size)]

    @property
    def pids(self) -> list[int]:
        return [1000 + rank for rank in range(self._tp_size)]

    @property
    def num_operations(self) -> int:
        """Operations that the front has not closed."""
        return len(self._owner.operations)

    def submit(self, message: FrontStepMessage) -> None:
        if isinstance(message, AddRow):
            self._seeds[message.row] = message.sampling.seed
        elif isinstance(message, StepPlan) and not self.hangs:
            tokens = [
                SampledToken(segment.row, token_of(self._seeds[segment.row], segment.output_index))
                for segment in message.segments
                if segment.sample
            ]
            self._results.put_nowait(StepResult(message.step_id, tokens, 1))

    def begin(self, rank: int, message: FrontKVMessage) -> Operation:
        operation = Operation(cast(Any, self._owner), message.op_id)
        self._owner.operations[message.op_id] = operation
        if isinstance(message, PostReceive) and not self.holds_posts:
            if rank in self.refuse_posts:
                operation.deliver(ReceivePosted(message.op_id, *self.refuse_posts[rank]))
            else:
                operation.deliver(ReceivePosted(message.op_id))
                self.posts.put_nowait((rank, message))
        elif isinstance(message, GetTransportStats) and not self.kv_hangs:
            self.num_pings += 1
            operation.deliver(TransportStatsReply(message.op_id, 0, 0, 0, 0, self.stale_messages, 1))
        return operation

    def follow_up(self, rank: int, message: FrontKVMessage) -> None:
        assert isinstance(message, CancelReceive)
        self.num_cancels += 1
        if self.hold_cancels:
            self._held_cancels.append(message)
        else:
            self._owner.operations[message.op_id].deliver(CancelDone(message.op_id, self.cancel_outcome))

    async def stop(self, grace_s: float) -> None:
        self.lose("stopped")

    def answer_cancels(self) -> None:
        """The ranks answer what `hold_cancels` held back."""
        for message in self._held_cancels:
            self._owner.operations[message.op_id].deliver(CancelDone(message.op_id, self.cancel_outcome))

    def finish(
        self, post: PostReceive, error_kind: str = "", detail: str = "", scattered: Scattered | None = None
    ) -> None:
        """A leg arrived and was scattered, as it was posted unless said otherwise, or failed."""
        if scattered is None and not error_kind:
            scattered = scattered_as(post)
        done = ReceiveDone(post.op_id, 7, 5, error_kind, detail, scattered)
        self._owner.operations[post.op_id].deliver(done)

    def drain(self, post: PostReceive) -> None:
        """The connection behind a receive in doubt is closed."""
        self._owner.operations[post.op_id].deliver(SlotDrained(post.op_id))

    def lose(self, reason: str) -> None:
        """A rank dies."""
        super().lose(reason)
        for operation in self._owner.operations.values():
            operation.lose(reason)


def scattered_as(post: PostReceive) -> Scattered:
    """What a rank writes that does what it is told."""
    return Scattered(post.first_local_head, post.num_heads, post.first_layer, post.num_layers, post.block_ids)
