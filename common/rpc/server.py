"""A grpc.aio server with health, reflection, and one interceptor that maps our error tree to status.

An unknown exception becomes INTERNAL: its traceback is logged here and nothing of it reaches the client.
asyncio.CancelledError passes untouched. Knows no service.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeAlias, TypeVar

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from common.errors import FailedPrecondition, InternalError
from common.rpc.client import KEEPALIVE_OPTIONS
from common.rpc.health import HealthServicer
from common.rpc.status import abort_with, find_baton_error

_logger = logging.getLogger(__name__)
_Servicer = TypeVar("_Servicer")
# gRPC hands requests and responses over untyped.
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_RpcHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Behavior = Callable[[Any, _Context], Any]
_Handler = Callable[[Any, _Context], Coroutine[Any, Any, Any]]

MIN_PING_INTERVAL_MS = 1_000


class RpcServer:
    """A gRPC server on one address. Health says NOT_SERVING until `set_serving(True)`."""

    def __init__(self, address: str, *, max_message_bytes: int, so_reuseport: bool = False) -> None:
        self._address = address
        self._health = HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[_ErrorInterceptor()],
            options=[
                ("grpc.max_send_message_length", max_message_bytes),
                ("grpc.max_receive_message_length", max_message_bytes),
                ("grpc.so_reuseport", int(so_reuseport)),
                # A client that is gone without a word, or frozen, must not keep what it holds until its deadline.
                *KEEPALIVE_OPTIONS,
                # Clients ping idle connections (common.rpc.client); that is no abuse.
                ("grpc.http2.min_recv_ping_interval_without_data_ms", MIN_PING_INTERVAL_MS),
                ("grpc.http2.max_ping_strikes", 0),
            ],
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)

    def add(
        self,
        add_fn: Callable[[_Servicer, grpc.aio.Server], None],
        servicer: _Servicer,
        service_full_name: str,
    ) -> None:
        """Add a service before `start`: `add(add_DecodeServicer_to_server, servicer, "baton.v1.Decode")`."""
        add_fn(servicer, self._server)
        self._health.names.add(service_full_name)

    async def start(self) -> int:
        """Bind and serve. Returns the port (the kernel's choice if the address ends in `:0`)."""
        names = filter(None, self._health.names)
        reflection.enable_server_reflection(
            [*names, health_pb2.DESCRIPTOR.services_by_name["Health"].full_name, reflection.SERVICE_NAME],
            self._server,
        )
        try:
            port: int = self._server.add_insecure_port(self._address)
        except RuntimeError as error:
            raise FailedPrecondition(f"cannot listen on {self._address}: {error}") from error
        await self._server.start()
        return port

    def set_serving(self, serving: bool) -> None:
        """What grpc.health.v1 answers from now on, for every service and for the server as a whole."""
        self._health.set_serving(serving)

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls at once, give those under way `grace_s` seconds, then cancel them."""
        self._health.end()
        await self._server.stop(grace_s)


class _ErrorInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler once per call; costs nothing per message of a stream."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_RpcHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _RpcHandler | None:
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = ("stream" if handler.request_streaming else "unary") + (
            "_stream" if handler.response_streaming else "_unary"
        )
        make_handler: Callable[..., _RpcHandler] = getattr(grpc, f"{kind}_rpc_method_handler")
        return make_handler(
            _mapped(getattr(handler, kind), handler_call_details.method),
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )


def _mapped(behavior: _Behavior, method: str) -> _Handler:
    if inspect.isasyncgenfunction(behavior):
        behavior = _written(behavior)

    async def call(request_or_iterator: Any, context: _Context) -> Any:
        try:
            return await behavior(request_or_iterator, context)
        except grpc.aio.AbortError:
            raise
        except Exception as error:
            await _abort(context, method, error)

    return call


def _written(generator: _Behavior) -> _Handler:
    """An async generator handler as a coroutine handler; the generator is closed when the call is over."""

    async def call(request_or_iterator: Any, context: _Context) -> None:
        async with contextlib.aclosing(generator(request_or_iterator, context)) as responses:
            async for response in responses:
                await context.write(response)

    return call


async def _abort(context: _Context, method: str, error: Exception) -> None:
    if context.done():
        raise asyncio.CancelledError from error  # there is nobody to tell
    known = find_baton_error(error)
    if known is None and _is_broken_call(error):
        # A write failed because the client went away, before its cancellation has come through.
        raise asyncio.CancelledError from error
    if known is None or isinstance(known, InternalError):
        _logger.error("%s: unexpected %s", method, type(error).__name__, exc_info=error)
    try:
        await abort_with(context, known or InternalError("internal error; see the server's log"))
    except grpc.aio.AbortError:
        raise
    except grpc.aio.BaseError as broken:
        raise asyncio.CancelledError from broken


def _is_broken_call(error: BaseException) -> bool:
    """Whether gRPC could not write, alone or as the one cause of an exception group."""
    if isinstance(error, BaseExceptionGroup):
        return all(_is_broken_call(inner) for inner in error.exceptions)
    return isinstance(error, grpc.aio.BaseError)
