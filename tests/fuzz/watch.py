"""What must hold while anything is sent: no process ends, every server answers within a second.

Asks each server's health on a connection that stands and on new ones; compares processes by their ids.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Final

import grpc
import psutil  # type: ignore[import-untyped]
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cli.deployment import Deployment

UNRESPONSIVE_S: Final = 1.0
_PERIOD_S: Final = 0.1
_GIVE_UP_S: Final = 20.0


@dataclass(slots=True)
class Watch:
    """Of one deployment. `faults` says what did not hold; `slowest_s` the longest answer of each server."""

    deployment: Deployment
    faults: list[str] = field(default_factory=list)
    slowest_s: dict[str, float] = field(default_factory=dict)
    _pids: set[int] = field(default_factory=set)

    def note_processes(self) -> None:
        """All processes of the deployment are as they should be now."""
        self._pids = self._processes()

    def check_processes(self) -> None:
        """Those that were noted still run."""
        gone = self._pids - self._processes()
        for pid in sorted(gone):
            self.faults.append(f"process {pid} ended")
        self._pids -= gone

    async def run(self) -> None:
        """Ask until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for process in self.deployment.processes:
                for is_new in (False, True):
                    tasks.create_task(self._ask(process.name, process.address, is_new))

    def _processes(self) -> set[int]:
        found: set[int] = set()
        for process in self.deployment.processes:
            if process.process is not None and process.process.returncode is None:
                front = psutil.Process(process.pid)
                family = [front, *front.children(recursive=True)]
                found |= {each.pid for each in family if each.status() != psutil.STATUS_ZOMBIE and not _renders(each)}
        return found

    async def _ask(self, name: str, address: str, is_new: bool) -> None:
        channel = _channel(address)
        try:
            while True:
                if is_new:
                    await channel.close()
                    channel = _channel(address)
                await self._ask_once(name, channel, "a new connection" if is_new else "a standing connection")
                await asyncio.sleep(5 * _PERIOD_S if is_new else _PERIOD_S)
        finally:
            await channel.close()

    async def _ask_once(self, name: str, channel: grpc.aio.Channel, how: str) -> None:
        start_s, status = time.monotonic(), "answered"
        try:
            await health_pb2_grpc.HealthStub(channel).Check(
                health_pb2.HealthCheckRequest(), timeout=_GIVE_UP_S, wait_for_ready=True
            )
        except grpc.aio.AioRpcError as error:
            status = f"{error.code().name} {error.details()}"
        took_s = time.monotonic() - start_s
        self.slowest_s[name] = max(self.slowest_s.get(name, 0.0), took_s)
        if took_s > UNRESPONSIVE_S or status != "answered":
            self.faults.append(f"{name} on {how}: {status} after {took_s:.2f} s")


def _renders(process: psutil.Process) -> bool:
    """Whether it renders chats for a router, which ends it with a chat that takes too long, and starts another."""
    try:
        return "services.router.template_process" in process.cmdline()
    except psutil.NoSuchProcess:
        return True


def _channel(address: str) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(address, options=[("grpc.use_local_subchannel_pool", 1)])
