"""Servers whose handlers may say bytes that are no message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import grpc

GARBAGE = b"\xff\xff\xff"
_Servicer = TypeVar("_Servicer")


def with_garbage(
    add: Callable[[_Servicer, grpc.aio.Server], None],
) -> Callable[[_Servicer, grpc.aio.Server], None]:
    """What adds a servicer to a server as `add` does, but that bytes are sent as they are."""

    def add_raw(servicer: _Servicer, server: grpc.aio.Server) -> None:
        add(servicer, cast(grpc.aio.Server, _Raw(server)))

    return add_raw


class _Raw:
    """Stands for the server in generated code."""

    def __init__(self, server: grpc.aio.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: object) -> None:
        """The same ones as in `add_registered_method_handlers`."""

    def add_registered_method_handlers(
        self, service: str, handlers: dict[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        raw = {name: cast(Any, handler)._replace(response_serializer=_serialized) for name, handler in handlers.items()}
        self._server.add_registered_method_handlers(service, raw)


def _serialized(message: Any) -> bytes:
    if isinstance(message, bytes):
        return message
    encoded: bytes = message.SerializeToString()
    return encoded
