"""Who has connected to us: what `Endpoint.wait_for_peer` waits on. Knows no wire.

A peer is known by its name and by a secret that it told to whoever waits for it, over another channel. Names are no
secrets: a stranger may bear any, and is somebody else.
"""

from __future__ import annotations

import asyncio
from typing import Final, Generic, TypeVar

from common.errors import InvalidArgument, TransferTimeout, Unavailable
from common.transport.base import Connection

MAX_PEER_NAME_BYTES: Final = 255
MAX_UNCLAIMED: Final = 256  # connections that nobody has waited for; ranks of real peers are few

ConnectionT = TypeVar("ConnectionT", bound=Connection)
_Peer = tuple[str, bytes]  # name and secret


class PeerBook(Generic[ConnectionT]):
    """The connections that were accepted and stand. Of a peer that connected again the newest is taken, and the one
    before it once that has left."""

    def __init__(self) -> None:
        self._standing: dict[_Peer, list[ConnectionT]] = {}  # the newest last
        self._unclaimed: dict[ConnectionT, None] = {}  # the oldest first
        self._waiting: dict[_Peer, list[asyncio.Future[ConnectionT]]] = {}

    def arrived(self, connection: ConnectionT, secret: bytes) -> ConnectionT | None:
        """It stands. Returns the oldest connection that nobody has waited for if there are too many: to be closed."""
        peer = connection.peer_name, secret
        self._standing.setdefault(peer, []).append(connection)
        waiting = self._waiting.pop(peer, [])
        for one in waiting:
            if not one.done():
                one.set_result(connection)
        if waiting:
            return None
        self._unclaimed[connection] = None
        return next(iter(self._unclaimed)) if len(self._unclaimed) > MAX_UNCLAIMED else None

    def left(self, connection: ConnectionT) -> None:
        """It does not stand any more, or never did."""
        self._unclaimed.pop(connection, None)
        for peer in [peer for peer, standing in self._standing.items() if connection in standing]:
            self._standing[peer].remove(connection)
            if not self._standing[peer]:
                del self._standing[peer]

    async def wait_for(self, peer_name: str, timeout_s: float, secret: bytes) -> ConnectionT:
        """Raises `TransferTimeout`. Cancelling the wait leaves nothing behind."""
        peer = peer_name, secret
        for here in reversed(self._standing.get(peer, [])):
            if here.alive:
                self._unclaimed.pop(here, None)
                return here
        waiting: asyncio.Future[ConnectionT] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(peer, []).append(waiting)
        try:
            return await asyncio.wait_for(waiting, timeout_s)
        except TimeoutError as error:
            raise TransferTimeout(f"peer {peer_name!r} did not connect within {timeout_s} s") from error
        finally:
            self._forget(peer, waiting)

    def close(self) -> None:
        """End every wait with `Unavailable`."""
        for waiting in (one for some in self._waiting.values() for one in some):
            if not waiting.done():
                waiting.set_exception(Unavailable("the transport endpoint was closed"))
        self._waiting.clear()
        self._standing.clear()
        self._unclaimed.clear()

    def _forget(self, peer: _Peer, waiting: asyncio.Future[ConnectionT]) -> None:
        left = [one for one in self._waiting.get(peer, []) if one is not waiting]
        if left:
            self._waiting[peer] = left
        else:
            self._waiting.pop(peer, None)


def check_peer_name(name: str) -> None:
    """Raise `InvalidArgument` unless the name fits in a hello."""
    if not 0 < len(name.encode()) <= MAX_PEER_NAME_BYTES:
        raise InvalidArgument("name", name, f"a peer name has 1 to {MAX_PEER_NAME_BYTES} bytes")
