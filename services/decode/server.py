"""The Decode service: gRPC streams, passed on to the worker. Decides nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import TypeAlias

import grpc
from baton.v1 import decode_pb2, decode_pb2_grpc, kv_pb2

from common.errors import BatonError, Cancelled, InternalError, InvalidArgument
from common.rpc.calls import REQUEST_TIMEOUT_S
from common.rpc.status import to_status
from common.telemetry.tracing import Traceparent
from services.decode import sessions
from services.decode.worker import DecodeWorker

_log = logging.getLogger(__name__)
_Requests: TypeAlias = AsyncIterator[decode_pb2.SessionRequest]
_SessionContext: TypeAlias = "grpc.aio.ServicerContext[decode_pb2.SessionRequest, decode_pb2.SessionResponse]"
WRITE_GRACE_S = 0.5  # for a message under way when a session ends; a router that does not read is not told why
SERVICE_NAME = "baton.v1.Decode"


class DecodeService(decode_pb2_grpc.DecodeServicer):
    """See the proto."""

    def __init__(self, worker: DecodeWorker) -> None:
        self._worker = worker

    async def Session(  # type: ignore[override] # noqa: N802 - the name in the proto; writes, is no generator
        self,
        request_iterator: _Requests,
        context: _SessionContext,
    ) -> None:
        first = await _first(request_iterator)
        if first is None or first.WhichOneof("message") != "begin":
            raise InvalidArgument("message", None, "a session starts with begin")
        async with asyncio.TaskGroup() as tasks:
            with self._worker.session(first.begin.session_id, first.begin.beats) as session:
                reading = tasks.create_task(self._read(session, request_iterator))
                writing = tasks.create_task(_write(session, context))
                error = await session.wait_over()
            # It holds nothing any more. A write that is abandoned leaves gRPC unable to say why.
            await asyncio.wait((writing,), timeout=WRITE_GRACE_S)
            for task in (reading, writing):
                task.cancel()
        raise error

    async def Handoff(  # type: ignore[override] # noqa: N802 - a coroutine that writes, not a generator
        self,
        request_iterator: AsyncIterator[kv_pb2.HandoffRequest],
        context: grpc.aio.ServicerContext[kv_pb2.HandoffRequest, kv_pb2.HandoffResponse],
    ) -> None:
        await self._worker.hand_off(request_iterator, context.write, self._worker.tracing.parent(context))

    async def _read(self, session: sessions.Session, requests: _Requests) -> None:
        """Do what the router says until the session is over. What is wrong with the stream itself ends it."""
        try:
            async for request in requests:
                if session.is_over:
                    return
                session.heard()
                kind = request.WhichOneof("message")
                if kind == "open":
                    session.answer(self._open(session, request.open))
                elif kind == "close":
                    self._worker.close(session.session_id, request.close.sequence_id)
                elif kind == "beat":
                    session.answer_beat(request.beat.number)
                elif kind is not None:  # what a later version says is no fault
                    raise InvalidArgument("message", kind, "expected open, close or beat")
            session.end(Cancelled("the router ended its session"))
        except BatonError as error:
            session.end(error)
        except Exception as error:  # of gRPC, when the call breaks
            _log.debug("a session's stream broke", exc_info=True)
            session.end(Cancelled(f"the session's stream broke: {error!r}"))

    def _open(self, session: sessions.Session, request: decode_pb2.OpenRequest) -> decode_pb2.OpenResponse:
        """Register a sequence, or say why not: a sequence that is refused is no reason to end the others."""
        response = decode_pb2.OpenResponse(sequence_id=request.sequence.sequence_id)
        worker, span = self._worker, self._worker.tracing.parent(Traceparent(request.traceparent))
        try:
            if request.compute_locally:
                worker.open_local(session.session_id, request.sequence, span)
            else:
                response.num_blocks_reused = worker.open(session.session_id, request.sequence, request.ticket_id, span)
        except BatonError as error:
            response.error.CopyFrom(to_status(error))
        except Exception:
            _log.exception("a sequence could not be opened")
            response.error.CopyFrom(to_status(InternalError("internal error; see the worker's log")))
        return response


async def _first(requests: _Requests) -> decode_pb2.SessionRequest | None:
    """None at the end of the stream."""
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            return await anext(requests, None)
    except TimeoutError as error:
        limit = f"a session starts with begin, which did not come within {REQUEST_TIMEOUT_S:g} s"
        raise InvalidArgument("message", None, limit) from error


async def _write(session: sessions.Session, context: _SessionContext) -> None:
    """Send what there is until the session is over, which it also is when gRPC cannot write."""
    try:
        async with contextlib.aclosing(session.responses()) as responses:
            async for response in responses:
                await context.write(response)
    except BatonError:
        _log.debug("session %s is over", session.session_id)
    except Exception as error:  # of gRPC, when the call breaks
        _log.debug("a session's stream broke", exc_info=True)
        session.end(Cancelled(f"the session's stream broke: {error!r}"))
