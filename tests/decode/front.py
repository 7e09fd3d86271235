"""A whole decode front over fake ranks, with routers and prefill workers that are plain objects."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

from baton.v1 import decode_pb2, kv_pb2, sampling_pb2

from common.kvcache.layout import KVLayout
from common.models.config import ModelConfig
from common.models.rope_config import RopeConfig
from common.telemetry.tracing import NO_SPAN, Span
from common.worker.rank_group import RankGroup
from common.worker.rank_messages import PostReceive
from common.worker.worker_front import StartGroup
from common.worker.worker_model import WorkerModel
from services.decode.config import DecodeConfig
from services.decode.worker import DecodeWorker
from tests.decode.fake_group import FakeGroup
from tests.decode.requests import VOCAB_SIZE

BLOCK_SIZE = 4
PATIENCE_S = 20.0  # of tests: reached only by a failure
NUM_LAYERS = 2
LAYOUT = KVLayout(num_layers=NUM_LAYERS, num_kv_heads=2, head_dim=8, block_size=BLOCK_SIZE, dtype="float32")


def make_model() -> WorkerModel:
    config = ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_layers=NUM_LAYERS,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        context_length=256,
        rope=RopeConfig("default", 10000.0),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=True,
        windows=(None,) * NUM_LAYERS,
        dtype="float32",
    )
    return WorkerModel("tiny", config, "float32", LAYOUT, b"model", "layout")


class OpenTicket(NamedTuple):
    """What a router knows of a sequence that it opened."""

    ticket_id: int
    num_blocks_reused: int = 0


class Front:
    """The worker, its ranks, and a way to wait for a state without sleeping."""

    def __init__(
        self,
        tp_size: int = 1,
        num_slots: int = 2,
        num_blocks: int = 32,
        start_ranks: StartGroup = RankGroup.start,
        **settings: object,
    ) -> None:
        config = DecodeConfig.model_validate(
            {
                "model": Path("unused"),
                "block_size": BLOCK_SIZE,
                "tp_size": tp_size,
                "num_slots": num_slots,
                "num_blocks": num_blocks,
                **settings,
            }
        )
        self._changed = asyncio.Event()
        self.ticket_ids = itertools.count(1)
        self.worker = DecodeWorker(config, make_model(), self._changed.set, start_ranks)
        self.group = FakeGroup(tp_size)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for a change after which the condition holds."""
        async with asyncio.timeout(PATIENCE_S):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    async def until_free(self) -> None:
        """Wait until nothing is held, and check every count."""
        await self.until(self._holds_nothing)
        assert self.worker.handoffs.num_streams == 0
        self.worker.scheduler.check_integrity()

    def _holds_nothing(self) -> bool:
        status = self.worker.status()
        names = "num_blocks_held num_slots_in_use num_slots_quarantined num_open num_running num_grants_waiting"
        return not any(getattr(status, name) for name in names.split())


@contextlib.asynccontextmanager
async def running_front(tp_size: int = 1, **settings: object) -> AsyncIterator[Front]:
    """A front whose ranks are ready."""
    front = Front(tp_size, **settings)  # type: ignore[arg-type]
    async with asyncio.TaskGroup() as tasks:
        running = [tasks.create_task(front.worker.handoff_context.run()), tasks.create_task(front.worker.engine.run())]
        await asyncio.sleep(0)  # the tasks take their places
        front.worker.on_ready(front.group)
        try:
            yield front
        finally:
            for task in running:
                task.cancel()


class Router:
    """A router process: its stream, and what came over it."""

    def __init__(self, front: Front, session_id: str = "router") -> None:
        self._front = front
        self.session_id = session_id
        self.tokens: dict[int, list[int]] = {}
        self.ends: dict[int, str] = {}
        self._first_position = 1  # the first token comes from prefill
        self._arrived = asyncio.Event()
        self._stands = asyncio.Event()
        self._reader = asyncio.create_task(self._read())

    async def _read(self) -> None:
        with self._front.worker.session(self.session_id) as session:
            async for response in session.responses():
                self._stands.set()
                for entry in response.sequences:
                    known = self.tokens.setdefault(entry.sequence_id, [])
                    if entry.token_ids:
                        assert entry.first_position == self._first_position + len(known), (
                            "a token is missing or came twice"
                        )
                    known.extend(entry.token_ids)
                    if entry.end:
                        assert entry.sequence_id not in self.ends
                        self.ends[entry.sequence_id] = decode_pb2.SequenceEnd.Name(entry.end)[len("SEQUENCE_END_") :]
                self._arrived.set()

    async def subscribed(self) -> Router:
        async with asyncio.timeout(PATIENCE_S):
            await self._stands.wait()
        return self

    async def end_of(self, sequence_id: int) -> str:
        """How a sequence ended, once it has."""
        async with asyncio.timeout(PATIENCE_S):
            while sequence_id not in self.ends:
                self._arrived.clear()
                await self._arrived.wait()
        return self.ends[sequence_id]

    def open(
        self,
        sequence_id: int,
        num_tokens: int = 10,
        max_tokens: int = 4,
        seed: int = 1,
        timeout_s: float = 60.0,
        span: Span = NO_SPAN,
    ) -> OpenTicket:
        sequence = self._sequence(sequence_id, num_tokens, max_tokens, seed, timeout_s)
        ticket_id = next(self._front.ticket_ids)
        return OpenTicket(ticket_id, self._front.worker.open(self.session_id, sequence, ticket_id, span))

    def open_local(self, sequence_id: int, span: Span = NO_SPAN) -> None:
        """A sequence whose prompt is computed by the worker itself: all of its tokens come over the stream."""
        self._first_position = 0
        self._front.worker.open_local(self.session_id, self._sequence(sequence_id), span)

    def _sequence(
        self, sequence_id: int, num_tokens: int = 10, max_tokens: int = 4, seed: int = 1, timeout_s: float = 60.0
    ) -> kv_pb2.Sequence:
        return kv_pb2.Sequence(
            request_id="request",
            sequence_id=sequence_id,
            token_ids=[1 + (sequence_id + index) % (VOCAB_SIZE - 1) for index in range(num_tokens)],
            num_prompt_tokens=num_tokens,
            sampling=sampling_pb2.SamplingParams(max_tokens=max_tokens, seed=seed),
            timeout_ns=round(timeout_s * 1e9),
        )

    async def leave(self) -> None:
        """The stream breaks."""
        self._reader.cancel()
        await asyncio.wait({self._reader})


class Prefill:
    """A prefill worker's end of one hand-off, in memory."""

    def __init__(
        self,
        front: Front,
        ticket: OpenTicket,
        tp_size: int = 1,
        fingerprint: str = "layout",
        span: Span = NO_SPAN,
        secrets: list[bytes] | None = None,
        num_unread: int = 0,  # answers after which nobody reads; 0: all are read
    ) -> None:
        self._requests: asyncio.Queue[kv_pb2.HandoffRequest | None] = asyncio.Queue()
        self._responses: asyncio.Queue[kv_pb2.HandoffResponse] = asyncio.Queue(num_unread)
        self.call = asyncio.create_task(front.worker.hand_off(self._read(), self._responses.put, span))
        self.send(
            begin=kv_pb2.HandoffBegin(
                ticket_id=ticket.ticket_id,
                prefill_worker_id="prefill",
                prefill_tp_size=tp_size,
                layout_fingerprint=fingerprint,
                rank_peer_names=[f"prefill/{rank}" for rank in range(tp_size)],
                connection_secrets=[bytes([rank] * 16) for rank in range(front.worker.config.tp_size)]
                if secrets is None
                else secrets,
            )
        )

    async def _read(self) -> AsyncIterator[kv_pb2.HandoffRequest]:
        while (request := await self._requests.get()) is not None:
            yield request

    def send(self, **message: object) -> None:
        self._requests.put_nowait(kv_pb2.HandoffRequest(**message))  # type: ignore[arg-type]

    def offer(
        self,
        index: int,
        first_block: int,
        num_blocks: int,
        first_layer: int = 0,
        num_layers: int = NUM_LAYERS,
        num_final_blocks: int = 0,
    ) -> None:
        chunk = kv_pb2.ChunkOffer(
            chunk_index=index,
            first_block=first_block,
            num_blocks=num_blocks,
            first_layer=first_layer,
            num_layers=num_layers,
            num_final_blocks=num_final_blocks,
        )
        self.send(chunk_offer=chunk)

    def finish(self, num_blocks: int, first_token_id: int = 1) -> None:
        self.send(finish=kv_pb2.HandoffFinish(first_token_id=first_token_id, num_blocks=num_blocks))

    def half_close(self) -> None:
        self._requests.put_nowait(None)

    async def receive(self, kind: str) -> kv_pb2.HandoffResponse:
        """The next answer, which must be of this kind; raises what the call raised if that comes first."""
        async with asyncio.timeout(PATIENCE_S):
            answer = asyncio.create_task(self._responses.get())
            await asyncio.wait({answer, self.call}, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                answer.cancel()
                self.call.result()
        response = answer.result()
        assert response.WhichOneof("message") == kind, response
        return response

    async def over(self) -> None:
        """Returns when the call has; raises what it raised."""
        async with asyncio.timeout(PATIENCE_S):
            await self.call

    async def break_off(self) -> None:
        """The connection breaks: gRPC cancels the call's handler."""
        self.call.cancel()
        await asyncio.wait({self.call})


async def next_post(front: Front) -> tuple[int, PostReceive]:
    """The next receive that the front posts, and on which rank."""
    async with asyncio.timeout(PATIENCE_S):
        return await front.group.posts.get()


async def ship(
    front: Front,
    prefill: Prefill,
    index: int,
    first_block: int,
    num_blocks: int,
    layers: range = range(NUM_LAYERS),
) -> None:
    """Offer one chunk and let it arrive."""
    prefill.offer(index, first_block, num_blocks, layers.start, len(layers))
    grant = (await prefill.receive("grant")).grant
    for _ in grant.legs:
        _, post = await next_post(front)
        front.group.finish(post)
    await prefill.receive("chunk_verified")
