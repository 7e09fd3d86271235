"""The service grpc.health.v1: whoever checks or watches is told the latest state, and nobody waits for whom it tells.

The state is plain and changes at once. Each watch writes for itself and holds nothing meanwhile that another one or a
change needs: a client that does not read misses states in between, and delays nobody. Knows no other service.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeAlias

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common.errors import NotFound, ResourceExhausted, Unavailable

MAX_STALL_S = 30.0  # for a watcher to make room for the next state
LAST_WRITE_S = 0.5  # for the last one
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
        self._writes: set[asyncio.Timeout] = set()  # that are under way

    def set_serving(self, serving: bool) -> None:
        """What is answered from now on, unless `end` was called."""
        if not self._is_over:
            self._is_serving = serving
            self._tell()

    def end(self) -> None:
        """NOT_SERVING for good: every watch says so and ends, so that no server waits for it when it drains."""
        self._is_serving, self._is_over = False, True
        until_s = asyncio.get_running_loop().time() + LAST_WRITE_S if self._writes else 0.0
        for limit in self._writes:
            if not limit.expired():
                limit.reschedule(until_s)
        self._tell()

    async def Check(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: _Context
    ) -> health_pb2.HealthCheckResponse:
        if request.service not in self.names:
            raise NotFound(f"no service {request.service!r} here")
        return health_pb2.HealthCheckResponse(status=self._status(request.service))

    async def List(  # noqa: N802
        self, request: health_pb2.HealthListRequest, context: _Context
    ) -> health_pb2.HealthListResponse:
        answers = {name: health_pb2.HealthCheckResponse(status=self._status(name)) for name in self.names}
        return health_pb2.HealthListResponse(statuses=answers)

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
                await self._write(context, status)
                told = status
            elif self._is_over:
                return
            else:
                await changed.wait()

    async def _write(self, context: _Context, status: int) -> None:
        try:
            async with asyncio.timeout(LAST_WRITE_S if self._is_over else MAX_STALL_S) as limit:
                self._writes.add(limit)
                try:
                    await context.write(health_pb2.HealthCheckResponse(status=status))
                finally:
                    self._writes.discard(limit)
        except TimeoutError as error:
            raise Unavailable("this watch is not read") from error

    def _status(self, name: str) -> int:
        response = health_pb2.HealthCheckResponse
        if name not in self.names:
            return int(response.SERVICE_UNKNOWN)
        return int(response.SERVING if self._is_serving else response.NOT_SERVING)

    def _tell(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
