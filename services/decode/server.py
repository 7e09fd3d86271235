"""The Decode service: gRPC calls, passed on to the worker. Decides nothing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import grpc
from baton.v1 import decode_pb2, decode_pb2_grpc, kv_pb2

from services.decode.worker import DecodeWorker

SERVICE_NAME = "baton.v1.Decode"


class DecodeService(decode_pb2_grpc.DecodeServicer):
    """See the proto."""

    def __init__(self, worker: DecodeWorker) -> None:
        self._worker = worker

    async def Subscribe(  # noqa: N802 - the name in the proto
        self,
        request: decode_pb2.SubscribeRequest,
        context: grpc.aio.ServicerContext[decode_pb2.SubscribeRequest, decode_pb2.TokenBatch],
    ) -> AsyncIterator[decode_pb2.TokenBatch]:
        async with contextlib.aclosing(self._worker.subscribe(request.session_id)) as batches:
            async for batch in batches:
                yield batch

    async def Open(  # noqa: N802
        self,
        request: decode_pb2.OpenRequest,
        context: grpc.aio.ServicerContext[decode_pb2.OpenRequest, decode_pb2.OpenResponse],
    ) -> decode_pb2.OpenResponse:
        span = self._worker.tracing.parent(context)
        if request.compute_locally:
            self._worker.open_local(request.session_id, request.sequence, span)
            return decode_pb2.OpenResponse()
        return decode_pb2.OpenResponse(ticket=self._worker.open(request.session_id, request.sequence, span))

    async def Close(  # noqa: N802
        self,
        request: decode_pb2.CloseRequest,
        context: grpc.aio.ServicerContext[decode_pb2.CloseRequest, decode_pb2.CloseResponse],
    ) -> decode_pb2.CloseResponse:
        return decode_pb2.CloseResponse(was_open=self._worker.close(request.session_id, request.sequence_id))

    async def Handoff(  # type: ignore[override] # noqa: N802 - a coroutine that writes, not a generator
        self,
        request_iterator: AsyncIterator[kv_pb2.HandoffRequest],
        context: grpc.aio.ServicerContext[kv_pb2.HandoffRequest, kv_pb2.HandoffResponse],
    ) -> None:
        await self._worker.hand_off(request_iterator, context.write, self._worker.tracing.parent(context))
