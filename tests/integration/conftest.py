"""Deployments for the integration tests: separate processes, real gRPC, real UCX."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cli.client import Client, connect
from cli.deployment import Deployment, DeploymentSpec
from cli.up import DEFAULT_MODEL
from tests.integration.reference import Reference


@asynccontextmanager
async def deployed(spec: DeploymentSpec) -> AsyncIterator[tuple[Deployment, Client]]:
    """A deployment that is ready, and a client of its router."""
    events: list[str] = []
    async with Deployment(spec, on_event=events.append) as deployment:
        await deployment.ready(timeout_s=90.0)
        async with connect(deployment.router_address) as client:
            yield deployment, client


@pytest.fixture(scope="session")
def shipped_model() -> Path:
    return DEFAULT_MODEL


@pytest.fixture(scope="session")
def shipped_reference(shipped_model: Path) -> Reference:
    return Reference(shipped_model)
