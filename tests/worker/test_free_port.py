"""Ports that are free."""

from __future__ import annotations

import socket

import pytest

from common.errors import FailedPrecondition
from common.worker.free_port import free_ports, require_free


def test_ports_differ_and_can_be_bound() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_a_port_that_somebody_listens_on_is_not_free_even_if_he_would_share_it(shares: bool, host: str) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shares))
        other.bind((host, 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(FailedPrecondition, match=f"127.0.0.1:{port}"):
            require_free("127.0.0.1", port)
    require_free("127.0.0.1", port)
    require_free("127.0.0.1", 0)


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(FailedPrecondition, match=r"192\.0\.2\.1:0"):
        require_free("192.0.2.1", 0)
