"""Who has connected to us, by peer name: what `Endpoint.wait_for_peer` waits on. Knows no wire."""

from __future__ import annotations

import asyncio
from typing import Generic, TypeVar

from common.errors import InvalidArgument, TransferTimeout, Unavailable
from common.transport.base import Connection

MAX_PEER_NAME_BYTES = 255

ConnectionT = TypeVar("ConnectionT", bound=Connection)


class PeerBook(Generic[ConnectionT]):
    """The newest accepted connection of every peer name: a peer that comes back replaces its lost one."""

    def __init__(self) -> None:
        self._connections: dict[str, ConnectionT] = {}
        self._waiting: dict[str, list[asyncio.Future[ConnectionT]]] = {}

    def arrived(self, connection: ConnectionT) -> None:
        self._connections[connection.peer_name] = connection
        for waiting in self._waiting.pop(connection.peer_name, []):
            if not waiting.done():
                waiting.set_result(connection)

    def left(self, connection: ConnectionT) -> None:
        if self._connections.get(connection.peer_name) is connection:
            del self._connections[connection.peer_name]

    async def wait_for(self, peer_name: str, timeout_s: float) -> ConnectionT:
        """Raises `TransferTimeout`. Cancelling the wait leaves nothing behind."""
        here = self._connections.get(peer_name)
        if here is not None and here.alive:
            return here
        waiting: asyncio.Future[ConnectionT] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(peer_name, []).append(waiting)
        try:
            return await asyncio.wait_for(waiting, timeout_s)
        except TimeoutError as error:
            raise TransferTimeout(f"peer {peer_name!r} did not connect within {timeout_s} s") from error
        finally:
            self._forget(peer_name, waiting)

    def close(self) -> None:
        """End every wait with `Unavailable`."""
        for waiting in (one for some in self._waiting.values() for one in some):
            if not waiting.done():
                waiting.set_exception(Unavailable("the transport endpoint was closed"))
        self._waiting.clear()
        self._connections.clear()

    def _forget(self, peer_name: str, waiting: asyncio.Future[ConnectionT]) -> None:
        left = [one for one in self._waiting.get(peer_name, []) if one is not waiting]
        if left:
            self._waiting[peer_name] = left
        else:
            self._waiting.pop(peer_name, None)


def check_peer_name(name: str) -> None:
    """Raise `InvalidArgument` unless the name fits in a hello."""
    if not 0 < len(name.encode()) <= MAX_PEER_NAME_BYTES:
        raise InvalidArgument("name", name, f"a peer name has 1 to {MAX_PEER_NAME_BYTES} bytes")
