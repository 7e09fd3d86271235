"""Channels with the options that every client in Baton uses. Knows no service."""

from __future__ import annotations

from typing import TypeVar

import grpc

from common.errors import Unavailable

_Message = TypeVar("_Message")

# A peer that is gone without a word, or stopped, is noticed after the one and then the other. A ping is answered by
# gRPC's own threads: a peer that only computes answers it.
KEEPALIVE_TIME_MS = 2_000
PING_TIMEOUT_MS = 2_500
MAX_RECONNECT_BACKOFF_MS = 1_000

# Of servers and clients alike.
KEEPALIVE_OPTIONS = (
    ("grpc.keepalive_time_ms", KEEPALIVE_TIME_MS),
    ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
    # In spite of its name this is TCP's alone, of data that the peer's kernel does not acknowledge: that of a stopped
    # process does.
    ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
)


def open_channel(address: str, max_message_bytes: int) -> grpc.aio.Channel:
    """A channel to `host:port`. Connects when first used; the caller owns it and closes it.

    A peer that is stopped, or whose machine is gone without a word, is noticed within 5 s; one that comes back is
    connected to again within about a second.
    """
    options = [
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.max_receive_message_length", max_message_bytes),
        *KEEPALIVE_OPTIONS,
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS),
        ("grpc.max_reconnect_backoff_ms", MAX_RECONNECT_BACKOFF_MS),
        # A call is sent again by whoever knows whether it may be, never by the library.
        ("grpc.enable_retries", 0),
        ("grpc.use_local_subchannel_pool", 1),
        # Peers are in one network; a proxy of the environment, which is for the world beyond, does not know them.
        ("grpc.enable_http_proxy", 0),
    ]
    return grpc.aio.insecure_channel(address, options=options)


def decoded(message: _Message | None, peer: str) -> _Message:
    """A message that a call brought. gRPC hands over None for one that it cannot decode: raises `Unavailable`, since
    what follows on that stream cannot be trusted either."""
    if message is None:
        raise Unavailable(f"{peer} sent what cannot be decoded")
    return message
