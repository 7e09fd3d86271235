"""A prefill front with real gRPC on both sides, fake ranks below it and a fake decode worker beside it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from baton.v1 import decode_pb2_grpc, kv_pb2, prefill_pb2, prefill_pb2_grpc, sampling_pb2, worker_pb2

from common.kvcache.layout import KVLayout
from common.models.config import parse_model_config
from common.rpc.client import open_channel
from common.rpc.server import RpcServer
from common.rpc.status import error_from_rpc
from common.worker.rank_group import RankGroup
from common.worker.rank_messages import StartRank
from common.worker.worker_model import WorkerModel
from services.prefill.config import PrefillConfig
from services.prefill.decode_peers import DecodePeers
from services.prefill.server import SERVICE_NAME, PrefillService
from services.prefill.worker import PrefillWorker
from tests.prefill.fakes import FakeDecode, FakeRanks, Wire

BLOCK_SIZE = 4
NUM_BLOCKS = 32
VOCAB_SIZE = 100
_MAX_MESSAGE_BYTES = 1 << 20
_SETTLE_S = 20.0

_MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
}


def make_model() -> WorkerModel:
    config = parse_model_config(_MODEL)
    layout = KVLayout(config.num_layers, config.num_kv_heads, config.head_dim, BLOCK_SIZE, "float32")
    return WorkerModel("tiny", config, "float32", layout, b"digest", "fingerprint")


def make_config(**changes: object) -> PrefillConfig:
    values: dict[str, object] = {
        "model": Path("unused"),
        "num_blocks": NUM_BLOCKS,
        "block_size": BLOCK_SIZE,
        "max_step_tokens": 16,
        "num_slots": 2,
        "slot_bytes": 1 << 16,
    }
    return PrefillConfig.model_validate(values | changes)


Call = grpc.aio.UnaryStreamCall[prefill_pb2.PrefillRequest, prefill_pb2.PrefillResponse]


@dataclass
class Harness:
    """What a test drives and looks at."""

    config: PrefillConfig
    worker: PrefillWorker
    decode: FakeDecode
    decode_address: str
    stub: prefill_pb2_grpc.PrefillAsyncStub
    incarnations: list[FakeRanks]
    changed: asyncio.Event
    on_start: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def ranks(self) -> FakeRanks:
        return self.incarnations[-1]

    def request(
        self, num_tokens: int = 22, first_token_id: int = 1, timeout_s: float = 30.0
    ) -> prefill_pb2.PrefillRequest:
        """A prompt and a ticket of the fake decode worker."""
        return prefill_pb2.PrefillRequest(
            sequence=kv_pb2.Sequence(
                request_id="r",
                sequence_id=1,
                token_ids=[(first_token_id + i) % VOCAB_SIZE for i in range(num_tokens)],
                num_prompt_tokens=num_tokens,
                sampling=sampling_pb2.SamplingParams(max_tokens=50, seed=1),
                timeout_ns=round(timeout_s * 1e9),
            ),
            ticket=kv_pb2.Ticket(
                ticket_id=77,
                decode_worker_id="decode-0",
                handoff_address=self.decode_address,
                rank_addresses=[f"ucx://127.0.0.1:{1 + rank}" for rank in range(self.decode.tp_size)],
                layout_fingerprint="fingerprint",
            ),
        )

    def call(self, request: prefill_pb2.PrefillRequest) -> Call:
        """A call that nobody reads."""
        return self.stub.Prefill(request)

    async def prefill(
        self, request: prefill_pb2.PrefillRequest
    ) -> tuple[prefill_pb2.FirstToken, prefill_pb2.PrefillCompleted]:
        """Raises the error that the worker sent."""
        try:
            responses = [response async for response in self.call(request)]
        except grpc.aio.AioRpcError as error:
            raise error_from_rpc(error) from error
        first, completed = responses
        return first.first_token, completed.completed

    async def until(self, condition: Callable[[worker_pb2.WorkerStatus], bool]) -> worker_pb2.WorkerStatus:
        """Wait until the worker's status is as wanted."""
        async with asyncio.timeout(_SETTLE_S):
            while not condition(status := self.worker.status()):
                self.changed.clear()
                await self.changed.wait()
        return status

    async def settled(self) -> worker_pb2.WorkerStatus:
        """Wait until nothing is held, and verify that this is the whole truth."""
        status = await self.until(holds_nothing)
        assert status.num_blocks_free + status.num_blocks_cached == NUM_BLOCKS
        assert status.num_slots_free == self.config.num_slots
        session = self.worker.session
        session.engine.scheduler.check_integrity()
        assert session.sends.slots.num_waiting == 0
        assert session.engine.num_jobs == 0
        assert session.ranks is self.ranks
        async with asyncio.timeout(_SETTLE_S):
            while self.decode.num_streams:
                await self.decode.stream_over.wait()
        return status


def holds_nothing(status: worker_pb2.WorkerStatus) -> bool:
    held = (status.num_blocks_held, status.num_slots_in_use, status.num_slots_quarantined)
    return held == (0, 0, 0) and status.num_waiting == 0 and status.num_running == 0


@asynccontextmanager
async def running(*, decode_tp: int = 1, **config_changes: object) -> AsyncIterator[Harness]:
    """A harness whose worker is ready. Leaving it stops everything."""
    config, model, changed, wire = make_config(**config_changes), make_model(), asyncio.Event(), Wire()
    incarnations: list[FakeRanks] = []

    async def start_ranks(_: str, specs: Sequence[StartRank], __: float) -> RankGroup:
        incarnations.append(FakeRanks(wire, pids=[1000 + spec.rank for spec in specs]))
        return incarnations[-1]

    worker = PrefillWorker(config, model, changed.set, start_ranks)
    peers = DecodePeers(_MAX_MESSAGE_BYTES, max_idle=1)
    decode = FakeDecode(model.layout, wire, tp_size=decode_tp)
    decode_server = RpcServer("127.0.0.1:0", max_message_bytes=_MAX_MESSAGE_BYTES)
    decode_server.add(decode_pb2_grpc.add_DecodeServicer_to_server, decode, "baton.v1.Decode")
    server = RpcServer("127.0.0.1:0", max_message_bytes=_MAX_MESSAGE_BYTES)
    server.add(prefill_pb2_grpc.add_PrefillServicer_to_server, PrefillService(worker, peers), SERVICE_NAME)
    decode_address = f"127.0.0.1:{await decode_server.start()}"
    async with (
        asyncio.TaskGroup() as tasks,
        open_channel(f"127.0.0.1:{await server.start()}", _MAX_MESSAGE_BYTES) as channel,
    ):
        run = tasks.create_task(worker.run())
        stub = prefill_pb2_grpc.PrefillStub(channel)
        harness = Harness(config, worker, decode, decode_address, stub, incarnations, changed)
        await harness.until(lambda status: status.state == worker_pb2.WORKER_STATE_READY)
        try:
            yield harness
        finally:
            await server.stop(0.0)
            await decode_server.stop(0.0)
            await peers.close()
            run.cancel()
