"""Ports of this machine that nobody has now. Somebody else may take one before it is used."""

from __future__ import annotations

import contextlib
import socket

from common.errors import FailedPrecondition


def free_ports(count: int, host: str = "127.0.0.1") -> list[int]:
    """Held open together while they are chosen, so that they differ. Raises `FailedPrecondition` for a host that is not
    this machine."""
    with contextlib.ExitStack() as stack:
        ports: list[int] = []
        try:
            for _ in range(count):
                probe = stack.enter_context(socket.socket())
                probe.bind((host, 0))
                ports.append(probe.getsockname()[1])
        except OSError as error:
            raise FailedPrecondition(f"cannot listen on {host}: {error.strerror}") from error
    return ports


def require_free(host: str, port: int) -> None:
    """Raises `FailedPrecondition` if somebody listens there, even one who would share the port (SO_REUSEPORT).

    Port 0, which the kernel chooses, is free.
    """
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that are over do not matter
            probe.bind(address)
    except OSError as error:
        raise FailedPrecondition(f"cannot listen on {host}:{port}: {error.strerror}") from error
