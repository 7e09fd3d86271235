"""The transport interface: tagged messages of exact size from one rank to another.

A *receiver* listens on an address and posts receives; a *sender* connects and sends. A message is matched by
(connection, tag); tags come from grants (`common.kvcache.grant`) and are used once. A sender whose tag was never
posted, or whose receive was cancelled, matches nothing: it is dropped and counted, and its bytes never reach
memory that was handed out. So post a receive before its tag is advertised. Backends are chosen by URL scheme in
`common.transport.registry`.

This module knows nothing of KV blocks, requests or gRPC.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

import torch

from common.transport.pair_secret import NO_SECRET


class CancelOutcome(enum.Enum):
    """What cancelling a posted receive leaves behind. KV blocks are free in all four; the slot in the first three."""

    NOT_ADVERTISED = "not_advertised"  # never posted: said by the owner of a grant, not by a transport
    DRAINED = "drained"  # the transport confirmed that no byte will arrive any more
    PEER_LOST = "peer_lost"  # the connection is closed and drained
    IN_DOUBT = "in_doubt"  # a write may still be under way: quarantine until the connection is closed and drained


@dataclass(frozen=True, slots=True)
class TransportStats:
    """Counters of one endpoint since it was opened."""

    bytes_sent: int
    bytes_received: int
    messages_sent: int
    messages_received: int
    stale_messages: int  # messages that matched no posted receive and were dropped
    connections: int  # connections that are open now


class PostedReceive(Protocol):
    """A receive that has been posted. Owned by whoever posted it; the buffer is lent until it is complete."""

    arrived_ns: int  # of `time.monotonic_ns`, when the message was there and bytes began to be written; 0: not yet

    @property
    def tag(self) -> int: ...

    async def wait(self) -> None:
        """Wait until exactly `buffer.nbytes` bytes are in the buffer.

        Raises `PeerLost` (the buffer's content is then undefined), `Truncated` (a shorter or longer message, of which
        nothing was written) or `Cancelled`. Cancelling the awaiting task leaves the receive posted: call `cancel`.
        """
        ...

    async def cancel(self, timeout_s: float) -> CancelOutcome:
        """Take the receive back; returns within about `timeout_s` seconds and says whether the buffer is reusable.

        A receive that had completed, or was `Truncated`, is `DRAINED`. Idempotent but for `IN_DOUBT`, which becomes
        `DRAINED` or `PEER_LOST` once the transport has let go of the buffer: ask again, or await the connection's
        `drained()`. Cancelling the awaiting task leaves the receive cancelled.
        """
        ...


class Connection(Protocol):
    """One peer, seen from this end. Either end may be the sender; Baton only sends from the connecting end."""

    @property
    def peer_name(self) -> str:
        """The name that the other end gave in its hello."""
        ...

    @property
    def lane(self) -> str:
        """What really carries the bytes, as the backend reports it: `inproc`, `tcp`, `sysv`, `posix`, `cuda_ipc`..."""
        ...

    @property
    def alive(self) -> bool: ...

    async def send(self, tag: int, buffer: torch.Tensor) -> None:
        """Send a contiguous uint8 tensor of shape [num_bytes] and wait until the buffer may be reused.

        The peer may not have it yet, and may drop it: completion only gives the buffer back. On a GPU, synchronise the
        writes to the buffer first. Raises `PeerLost`. Cancelling the awaiting task does not recall bytes: the caller
        must not reuse the buffer before `drained()` or the connection's close. Bound it with a timeout of your own.
        """
        ...

    def post_receive(self, tag: int, buffer: torch.Tensor) -> PostedReceive:
        """Post a receive into a contiguous uint8 tensor of shape [num_bytes]. Raises `PeerLost` if not alive,
        `ValueError` if the tag is already posted on this connection."""
        ...

    async def close(self) -> None:
        """Close both directions, idempotent. Pending sends and receives end with `PeerLost`, and no byte is written
        to any of their buffers after this returns."""
        ...

    async def drained(self) -> None:
        """Wait until this connection is closed and no operation of it is in flight."""
        ...


class Endpoint(Protocol):
    """One rank's presence on a transport. All methods run on one event loop."""

    @property
    def address(self) -> str:
        """URL that a peer's `connect` takes; empty if this end only connects."""
        ...

    async def connect(self, address: str, timeout_s: float, secret: bytes = NO_SECRET) -> Connection:
        """Connect to a listening endpoint and exchange names. `secret`: SECRET_BYTES that the other end has been told,
        or will be, over another channel. Raises `PeerLost` or `TransferTimeout`."""
        ...

    async def wait_for_peer(self, peer_name: str, timeout_s: float, secret: bytes = NO_SECRET) -> Connection:
        """The connection that the named peer opened to us with this secret. One that bears the name alone is another
        peer's. Raises `TransferTimeout` if it did not come."""
        ...

    def stats(self) -> TransportStats: ...

    async def close(self) -> None:
        """Close every connection and stop listening."""
        ...
