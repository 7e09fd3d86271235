"""Every call of a server, from its request's bytes to its status: one interceptor wraps all handlers.

It decodes requests, maps our error tree to gRPC status, and knows which calls are under way, so that a server can stop
without telling anybody CANCELLED. An unknown exception becomes INTERNAL: its traceback is logged here and nothing of it
reaches the client. asyncio.CancelledError passes untouched unless it is the server that ends the call.

    taken ──► handled ──► its status is sent
      │ refuse()  └── end(): cancelled, and UNAVAILABLE
      └──► UNAVAILABLE
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeAlias

import grpc

from common.errors import InternalError, InvalidArgument, Unavailable
from common.rpc.decoding import decoder
from common.rpc.status import abort_with, find_baton_error

_logger = logging.getLogger("common.rpc.server")
# gRPC hands requests and responses over untyped.
_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_RpcHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_Behavior = Callable[[Any, _Context], Any]
_Handler = Callable[[Any, _Context], Coroutine[Any, Any, Any]]

MAX_STALL_S = 30.0  # for a peer to make room for the next message of a stream
STATUS_GRACE_S = 1.0  # for a status; a caller that does not read what was written before it gets none
REQUEST_TIMEOUT_S = 30.0  # from a call's headers to the end of its one message
_STOPS = "the server stops"


class Calls(grpc.aio.ServerInterceptor):
    """Those of one server. Wraps every handler once; costs nothing per message of a stream."""

    def __init__(self) -> None:
        self._wrapped: dict[str, _RpcHandler] = {}  # by method, of which there are few
        self._running: dict[asyncio.Task[Any], _Context] = {}
        self._ended: set[asyncio.Task[Any]] = set()
        self._unread: set[asyncio.Task[Any]] = set()  # have said all, to callers that do not read
        self._are_refused = False
        self._one_is_over = asyncio.Event()
        self._last_over_s = -math.inf

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_RpcHandler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _RpcHandler | None:
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            handler = await continuation(handler_call_details)
            if handler is None:
                return None
            wrapped = self._wrapped[method] = self._wrap(handler, method)
        return wrapped

    @property
    def num_running(self) -> int:
        """Calls whose status has not been sent, but for those that only wait for a caller who does not read."""
        return len(self._running) - len(self._unread)

    def peer_ports(self) -> set[int]:
        """Where the callers' ends of connections with running calls are."""
        running = (context for task, context in self._running.items() if task not in self._unread)
        peers = [context.peer().rpartition(":")[2] for context in running]
        return {int(port) for port in peers if port.isdecimal()}

    def refuse(self) -> None:
        """Answer UNAVAILABLE to all that come from now on."""
        self._are_refused = True

    async def one_is_over(self) -> None:
        """Wait until some call that is running has ended."""
        await self._one_is_over.wait()

    def idle_s(self) -> float:
        """How long no call has run."""
        return 0.0 if self.num_running else asyncio.get_running_loop().time() - self._last_over_s

    async def end(self, grace_s: float) -> None:
        """Cancel those that run, but for the caller; each is told UNAVAILABLE, if it is in `grace_s`."""
        self._ended = {task for task in self._running if task is not asyncio.current_task()}
        for task in self._ended:
            task.cancel()
        if self._ended:
            await asyncio.wait(self._ended, timeout=grace_s)

    def _wrap(self, handler: _RpcHandler, method: str) -> _RpcHandler:
        """Takes its one request like a stream's: gRPC keeps the bytes of what it reads itself as long as the call
        lives, and would answer for what cannot be decoded."""
        response = "stream" if handler.response_streaming else "unary"
        request = "stream" if handler.request_streaming else "unary"
        behavior: _Behavior = getattr(handler, f"{request}_{response}")
        if inspect.isasyncgenfunction(behavior):
            behavior = _written(behavior)
        make_handler: Callable[..., _RpcHandler] = getattr(grpc, f"stream_{response}_rpc_method_handler")
        return make_handler(
            self._handled(behavior, method, one_request=not handler.request_streaming),
            request_deserializer=decoder(handler.request_deserializer, method),
            response_serializer=_serializer(handler.response_serializer),
        )

    def _handled(self, behavior: _Behavior, method: str, one_request: bool) -> _Handler:
        async def call(requests: Any, context: _Context) -> Any:
            task = self._begin(context)
            try:
                if self._are_refused:
                    raise Unavailable(_STOPS)
                if one_request:
                    # Held by nobody but the handler, which may let go of it.
                    return await behavior(await _only_request(context), context)
                return await behavior(requests, context)
            except grpc.aio.AbortError:
                raise
            except asyncio.CancelledError:
                if task not in self._ended:
                    raise
                await self._abort(task, context, method, Unavailable(_STOPS))
            except Exception as error:
                await self._abort(task, context, method, error)

        return call

    async def _abort(self, task: asyncio.Task[Any], context: _Context, method: str, error: Exception) -> None:
        """Send the status. Who does not read gets it when he does: no server waits for that when it drains."""
        timer = asyncio.get_running_loop().call_later(STATUS_GRACE_S, self._note_unread, task)
        try:
            await _abort(context, method, error)
        finally:
            timer.cancel()

    def _note_unread(self, task: asyncio.Task[Any]) -> None:
        self._unread.add(task)
        self._tell_over()

    def _begin(self, context: _Context) -> asyncio.Task[Any]:
        task = asyncio.current_task()
        assert task is not None, "gRPC runs each call in a task of its own"
        self._running[task] = context
        task.add_done_callback(self._is_over)
        return task

    def _is_over(self, task: asyncio.Task[Any]) -> None:
        del self._running[task]
        self._ended.discard(task)
        self._unread.discard(task)
        self._last_over_s = task.get_loop().time()
        self._tell_over()

    def _tell_over(self) -> None:
        over, self._one_is_over = self._one_is_over, asyncio.Event()
        over.set()


async def _only_request(context: _Context) -> Any:
    try:
        async with asyncio.timeout(REQUEST_TIMEOUT_S):
            request = await context.read()
    except TimeoutError as error:
        limit = f"one message, which did not come within {REQUEST_TIMEOUT_S:g} s"
        raise InvalidArgument("message", None, limit) from error
    if request is grpc.aio.EOF:
        raise InvalidArgument("message", None, "one message, which did not come")
    return request


def _serializer(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes] | None:
    """A handler may give bytes that it has serialized already, for many callers at once."""
    if serialize is None:
        return None
    return lambda message: message if isinstance(message, bytes) else serialize(message)


def _written(generator: _Behavior) -> _Handler:
    """An async generator handler as a coroutine handler; the generator is closed when the call is over."""

    async def call(request_or_iterator: Any, context: _Context) -> None:
        async with contextlib.aclosing(generator(request_or_iterator, context)) as responses:
            async for response in responses:
                await write_in_time(context, response, MAX_STALL_S)

    return call


async def write_in_time(context: _Context, response: Any, stall_timeout_s: float) -> None:
    """Write a message. Raises `Unavailable` if the peer makes no room for it in time: it does not read."""
    try:
        async with asyncio.timeout(stall_timeout_s):
            await context.write(response)
    except TimeoutError as error:
        raise Unavailable(f"the other end has read nothing for {stall_timeout_s:g} s") from error


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
