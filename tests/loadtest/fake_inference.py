"""A real gRPC server whose router answers as a test says: at once, slowly, never, or with an error."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2, worker_pb2, worker_pb2_grpc

from common.errors import BatonError
from common.rpc.server import RpcServer

VOCAB_SIZE = 1000
CONTEXT_LENGTH = 512


@dataclass
class FakeInference(inference_pb2_grpc.InferenceServicer, worker_pb2_grpc.WorkerServicer):
    """Sends one token a message. After `num_before_end` of them it raises `error`, or stalls if there is none; the
    first `num_good` requests are answered in full."""

    gap_s: float = 0.0
    num_before_end: int | None = None  # None: nothing goes wrong
    num_good: int = 0
    error: BatonError | None = None
    num_prefill_workers: int = 1
    requests: list[inference_pb2.GenerateRequest] = field(default_factory=list)
    deadlines_s: list[float] = field(default_factory=list)  # time that was left when each request came
    peers: list[str] = field(default_factory=list)  # the connection that each request came over
    stalled: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    served: asyncio.Queue[str] = field(default_factory=asyncio.Queue)  # ids of requests that were answered in full
    address: str = ""
    server: RpcServer | None = None

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        self.requests.append(request)
        self.peers.append(context.peer())
        self.deadlines_s.append(context.time_remaining())
        num_tokens = request.sampling.max_tokens
        num_before_end = self.num_before_end if len(self.requests) > self.num_good else None
        try:
            for position in range(num_tokens):
                if position == num_before_end:
                    await self._end()
                await asyncio.sleep(self.gap_s)
                yield inference_pb2.GenerateResponse(token_ids=(position,))
            yield self._last(request)
            self.served.put_nowait(request.request_id)
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            raise

    async def GetModelInfo(  # noqa: N802
        self, request: inference_pb2.GetModelInfoRequest, context: Any
    ) -> inference_pb2.GetModelInfoResponse:
        return inference_pb2.GetModelInfoResponse(
            model="fake",
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            eos_token_ids=(500,),
            num_prefill_workers=self.num_prefill_workers,
            num_decode_workers=1,
            is_serving=self.num_prefill_workers > 0,
        )

    async def GetStatus(self, request: worker_pb2.GetStatusRequest, context: Any) -> worker_pb2.WorkerStatus:  # noqa: N802
        return worker_pb2.WorkerStatus(role=worker_pb2.WORKER_ROLE_PREFILL, num_waiting=5, num_running=2)

    async def WatchStatus(  # noqa: N802
        self, request: worker_pb2.WatchStatusRequest, context: Any
    ) -> AsyncIterator[worker_pb2.WorkerStatus]:
        yield await self.GetStatus(worker_pb2.GetStatusRequest(), context)
        await asyncio.Event().wait()

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:  # noqa: N802
        return worker_pb2.DrainResponse()

    async def _end(self) -> None:
        if self.error is not None:
            raise self.error
        self.stalled.set()
        await asyncio.Event().wait()

    def _last(self, request: inference_pb2.GenerateRequest) -> inference_pb2.GenerateResponse:
        return inference_pb2.GenerateResponse(
            finish_reason=sampling_pb2.FINISH_REASON_LENGTH,
            usage=inference_pb2.Usage(num_prompt_tokens=len(request.token_ids.ids), num_cached_tokens=3),
            lifetime=inference_pb2.Lifetime(queue_ns=7, total_ns=11, transport="ucx:tcp"),
        )


@asynccontextmanager
async def serving(fake: FakeInference) -> AsyncIterator[FakeInference]:
    """Serve it on a free port, as a router and as a worker."""
    server = RpcServer("127.0.0.1:0", max_message_bytes=1 << 20)
    server.add(inference_pb2_grpc.add_InferenceServicer_to_server, fake, "baton.v1.Inference")
    server.add(worker_pb2_grpc.add_WorkerServicer_to_server, fake, "baton.v1.Worker")
    fake.server = server
    fake.address = f"127.0.0.1:{await server.start()}"
    try:
        yield fake
    finally:
        await server.stop(0.0)
