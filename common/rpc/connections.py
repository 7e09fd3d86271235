"""This process's TCP connections to one of its own ports, closed under gRPC where gRPC has no way to.

A gRPC server that shuts down answers calls that come meanwhile with CANCELLED, which no client sends again. One whose
connection has been closed knows that its call was not taken: UNAVAILABLE. Knows no gRPC.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Collection, Iterator

_DESCRIPTORS = "/proc/self/fd"  # Linux; elsewhere nothing is found, and nothing is closed


def close_listeners(port: int) -> None:
    """Take no connection any more. Those that stand stay.

    gRPC is left with a socket on which nothing ever comes, in the listener's place: of one that is shut down it would
    log an error.
    """
    for descriptor, each in _sockets_on(port):
        if each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            with socket.socket(each.family, each.type) as unbound:
                os.dup2(unbound.fileno(), descriptor, inheritable=False)


def close_connections(port: int, except_ports: Collection[int] = ()) -> None:
    """Send an end of file, behind all that was written, on connections but those from `except_ports` of peers."""
    for _, each in _sockets_on(port):
        if not each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            with contextlib.suppress(OSError):  # it is gone already
                if each.getpeername()[1] not in except_ports:
                    each.shutdown(socket.SHUT_WR)


def _sockets_on(port: int) -> Iterator[tuple[int, socket.socket]]:
    """Sockets whose local port it is, each by a descriptor of its own beside its owner's."""
    try:
        descriptors = [int(name) for name in os.listdir(_DESCRIPTORS)]
    except OSError:
        return
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # it is closed meanwhile
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as found:
                is_tcp = found.family in (socket.AF_INET, socket.AF_INET6) and found.type == socket.SOCK_STREAM
                if is_tcp and found.getsockname()[1] == port:
                    yield descriptor, found
