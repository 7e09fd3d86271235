"""grpc.aio's server, but for one thing: a `:path` that is no UTF-8 does not end it.

grpcio decodes the path of a call to an unknown method in the loop that takes all calls, and ends with it: the port is
closed and every call that comes is refused, for good. All our methods are registered with gRPC's core, which knows
their paths as bytes; so whatever reaches the loop unregistered is unknown, and is told so here without its path being
looked at. This holds to internals of grpcio: `tests/rpc/test_raw_http2.py` says when they change, and
`RpcServer.wait_ended` notices a loop that ended all the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import grpc
from grpc._cython import cygrpc
from grpc.aio import _server

_UNKNOWN_METHOD = "unknown"


def make_server(
    interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, Any]]
) -> grpc.aio.Server:
    """Serves registered methods (`add_*_to_server` registers them) and answers UNIMPLEMENTED to all others."""
    return _Server(interceptors, options)


class _Server(_server.Server):  # type: ignore[misc]
    def __init__(self, interceptors: Sequence[grpc.aio.ServerInterceptor], options: Sequence[tuple[str, Any]]) -> None:
        # In place of the base's, which makes a server of grpcio's own kind.
        self._loop = cygrpc.get_working_loop()
        self._server = _AioServer(self._loop, None, (), interceptors, tuple(options), None)

    def __del__(self) -> None:
        if not self._loop.is_closed():  # else nothing is left to shut down with
            super().__del__()


class _AioServer(cygrpc.AioServer):  # type: ignore[misc]
    def _make_request_call_future(self, method: bytes | None) -> asyncio.Future[Any]:
        """The next call of a registered method; None: of any other, which never comes, as it is answered at once."""
        if method is not None:
            future: asyncio.Future[Any] = super()._make_request_call_future(method)
            return future
        return asyncio.get_running_loop().create_task(self._refuse_unknown())

    async def _refuse_unknown(self) -> None:
        """Until the server stops: then raises what grpcio's loop expects. It is cancelled and awaited by that loop."""
        loop = asyncio.get_running_loop()
        nothing = cygrpc._MethodResolver([], {})
        async with asyncio.TaskGroup() as calls:
            while self.is_running():
                try:
                    call = await self._request_call()
                except cygrpc._RequestCallError:
                    continue
                refusal = cygrpc._handle_rpc(_UNKNOWN_METHOD, nothing, (), call, loop, False)
                calls.create_task(cygrpc._schedule_rpc_coro(refusal, call, loop, _UNKNOWN_METHOD))
        raise cygrpc._RequestCallError
