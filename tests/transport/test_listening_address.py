"""A listener on all addresses that takes connections to one of them only."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

import pytest

from common.transport.listening_address import confine_listener
from common.transport.ucx import UcxEndpoint, parse_ucx_url


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("0.0.0.0", 0)) as server:
        yield server


def answers(address: str, port: int) -> bool:
    try:
        with socket.create_connection((address, port), timeout=0.3):
            return True
    except TimeoutError:
        return False


def test_other_addresses_do_not_answer(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    assert answers("127.0.0.1", port)
    assert answers("127.0.0.2", port)
    assert confine_listener(port, "127.0.0.2")
    assert answers("127.0.0.2", port)
    assert not answers("127.0.0.1", port)
    with socket.create_connection(("127.0.0.2", port)) as there:
        while (here := listener.accept()[0]).getpeername() != there.getsockname():
            here.close()
        with here:
            there.sendall(b"x" * 100_000)
            assert len(here.recv(100_000, socket.MSG_WAITALL)) == 100_000


def test_a_port_that_nobody_listens_on_is_not_found(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    listener.close()
    assert not confine_listener(port, "127.0.0.1")


async def test_a_ucx_endpoint_listens_where_it_was_told() -> None:
    endpoint = UcxEndpoint("ucx://127.0.0.2:0", "p")
    port = parse_ucx_url(endpoint.address)[1]
    try:
        assert answers("127.0.0.2", port)
        assert not answers("127.0.0.1", port)
    finally:
        await endpoint.close()


async def test_a_ucx_endpoint_on_loopback_keeps_off_the_network() -> None:
    before = set(listening())
    endpoint = UcxEndpoint("ucx://127.0.0.1:0", "p")
    try:
        _, port = parse_ucx_url(endpoint.address)  # which is confined
        assert {address for address, one in set(listening()) - before if one != port} == {"127.0.0.1"}
    finally:
        await endpoint.close()


def listening() -> list[tuple[str, int]]:
    """Address and port of every IPv4 socket of this process that listens."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.family == socket.AF_INET and one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    found.append(one.getsockname())
    return found
