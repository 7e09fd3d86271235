"""Ports that are free."""

from __future__ import annotations

import socket

from common.worker.free_port import free_ports


def test_ports_differ_and_can_be_bound() -> None:
    ports = free_ports(20)
    assert len(set(ports)) == 20
    for port in ports:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
