"""The service grpc.health.v1: whoever checks or watches is told the latest state, and nobody waits for whom it tells.

The state is plain and changes at once. Each watch writes for itself and holds nothing meanwhile that another one or a
change needs: a client that does not read misses states in between, and delays nobody. Knows no other service.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import NotFound, ResourceExhausted

MAX_WATCHES = 128  # those who probe ask, those who balance watch: few of both

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """One state for all `names`: NOT_SERVING until `set_serving(True)`."""

    def __init__(self) -> None:
        self.names = {""}  # the server as a whole; services are added
        self._is_serving = False
        self._is_over = False
        self._changed = asyncio.Event()
        self._num_watches = 0

    def set_serving(self, serving: bool) -> None:
        """What is answered from now on, unless `end` was called."""
        if not self._is_over:
            self._is_serving = serving
            self._tell()

    def end(self) -> None:
        """NOT_SERVING for good: every watch says so and ends, so that no server waits for it when it drains."""
        self._is_serving, self._is_over = False, True
        self._tell()

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self.names:
            raise NotFound(f"no service {request.service!r} here")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: _Context) -> None:  # noqa: N802
        if self._num_watches >= MAX_WATCHES:
            raise ResourceExhausted(f"{MAX_WATCHES} streams watch this server's health, which is all it serves")
        self._num_watches += 1
        try:
            await self._watch(request, context)
        finally:
            self._num_watches -= 1

    async def _watch(self, request: health_pb2.HealthCheckRequest, context: _Context) -> None:
        told: int | None = None
        while True:
            changed, status = self._changed, self._status(request.service)
            if status != told:
                await context.write(health_pb2.HealthCheckResponse(status=status))
                told = status
            elif self._is_over:
                return
            else:
                await changed.wait()

    def _status(self, name: str) -> int:
        response = health_pb2.HealthCheckResponse
        if name not in self.names:
            return int(response.SERVICE_UNKNOWN)
        return int(response.SERVING if self._is_serving else response.NOT_SERVING)

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
