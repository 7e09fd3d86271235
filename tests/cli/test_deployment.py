"""A deployment on this machine: what is checked before anything starts, and how a start that goes wrong is told."""

from __future__ import annotations

import socket
import sys
from pathlib import Path

import pytest

from cli.deployment import Deployment, DeploymentSpec
from common.errors import FailedPrecondition, Unavailable


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


@pytest.fixture
def _fake_services(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that do nothing; one with the flag `--die` says why and ends."""
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\necho beginning\ncase \"$*\" in *--die*) echo 'no room [here]' >&2; exit 3;; esac\nexec sleep 600\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


@pytest.mark.usefixtures("_fake_services")
async def test_the_first_process_that_ends_ends_the_start_and_is_quoted(tmp_path: Path, shipped_model: Path) -> None:
    events: list[str] = []
    logs = tmp_path / "logs"
    spec = DeploymentSpec(model=shipped_model, num_decode=2, router_args=("--die",), log_dir=logs)
    async with Deployment(spec, on_event=events.append) as deployment:
        with pytest.raises(Unavailable) as failure:
            await deployment.ready(timeout_s=30.0)
        assert deployment.router.num_restarts == 0
    expected = f"router ended with status 3 before all was ready: no room [here] [{logs}/router.log]"
    assert str(failure.value) == expected
    assert len(events) == 1


@pytest.mark.usefixtures("_fake_services")
async def test_a_start_that_takes_too_long_says_who_is_late(tmp_path: Path, shipped_model: Path) -> None:
    async with Deployment(DeploymentSpec(model=shipped_model, log_dir=tmp_path / "logs")) as deployment:
        with pytest.raises(Unavailable) as failure:
            await deployment.ready(timeout_s=0.1)
    said = str(failure.value)
    assert said.startswith("after 0.1 s prefill-0 does not answer: beginning [")
    assert "; decode-0 does not answer: beginning [" in said
