"""Deployments for the tests: separate processes, real gRPC, real UCX."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from cli.client import Client, connect
from cli.deployment import Deployment, DeploymentSpec


@asynccontextmanager
async def deployed(spec: DeploymentSpec) -> AsyncIterator[tuple[Deployment, Client]]:
    """A deployment that is ready, and a client of its router."""
    async with Deployment(spec, on_event=print) as deployment:
        await deployment.ready(timeout_s=90.0)
        async with connect(deployment.router_address) as client:
            yield deployment, client
