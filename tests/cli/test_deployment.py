"""What a deployment on this machine checks before it starts anything."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cli.deployment import Deployment, DeploymentSpec
from common.errors import FailedPrecondition


@pytest.mark.parametrize("shares", [False, True])
async def test_a_routers_port_that_somebody_has_is_named_and_nothing_is_started(shares: bool) -> None:
    """Router processes share their port with each other, and would with those of another deployment."""
    with socket.socket() as other:
        if shares:
            other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        deployment = Deployment(DeploymentSpec(model=Path("unused"), router_port=port))
        with pytest.raises(FailedPrecondition, match=f"127.0.0.1:{port}"):
            await deployment.__aenter__()
        assert all(process.process is None for process in deployment.processes)
