"""What happens to a deployment in a soak: processes are killed, or stand still for a while (SIGSTOP), at random.

Workers' fronts, their ranks, router processes, the routers' supervisor, and clients that freeze with a request under
way. Says when the router itself was the victim: then a client that lost its connection asks again.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Final

import grpc
import psutil  # type: ignore[import-untyped]

from cli.deployment import Deployment, ManagedProcess

BETWEEN_S: Final = (2.0, 6.0)
FROZEN_S: Final = (0.5, 10.0)  # from hardly to be noticed to longer than anybody waits
ROUTER_RECOVERY_S: Final = 20.0  # a router that was killed listens again, what it had has ended
CLIENT_LIFE_S: Final = 10.0


@dataclass(slots=True)
class Troubles:
    """Makes trouble for one deployment. `counts` says what was done how often."""

    deployment: Deployment
    rng: random.Random
    counts: Counter[str] = field(default_factory=Counter)
    _router_trouble_until_s: float = 0.0
    _frozen: set[int] = field(default_factory=set)

    def router_is_in_trouble(self) -> bool:
        """Whether a call may fail because the router that had it was killed or stopped."""
        return time.monotonic() < self._router_trouble_until_s

    async def run(self, end_s: float) -> None:
        """Until `end_s` of time.monotonic(); whatever stood still goes on then."""
        kinds: list[Callable[[], Coroutine[None, None, None]]] = [
            self._kill_worker,
            self._kill_rank,
            self._freeze_worker,
            self._freeze_rank,
            self._kill_router,
            self._kill_supervisor,
            self._freeze_router,
            self._freeze_client,
        ]
        try:
            async with asyncio.TaskGroup() as tasks:
                while time.monotonic() < end_s:
                    await asyncio.sleep(self.rng.uniform(*BETWEEN_S))
                    (kind,) = self.rng.choices(kinds, (4, 4, 3, 3, 1, 1, 1, 1))
                    tasks.create_task(kind())
        finally:
            for pid in tuple(self._frozen):
                self._signal(pid, signal.SIGCONT)

    async def _kill_worker(self) -> None:
        worker = self._any_worker()
        self._do("kill", f"{worker.role} worker", worker.process.pid if worker.process else 0)

    async def _kill_rank(self) -> None:
        worker = self._any_worker()
        self._do("kill", f"{worker.role} rank", await self._rank_of(worker))

    async def _freeze_worker(self) -> None:
        worker = self._any_worker()
        await self._freeze(f"{worker.role} worker", worker.process.pid if worker.process else 0)

    async def _freeze_rank(self) -> None:
        worker = self._any_worker()
        await self._freeze(f"{worker.role} rank", await self._rank_of(worker))

    async def _kill_router(self) -> None:
        self._trouble_router(0.0)
        self._do("kill", "router process", self._router_process())

    async def _kill_supervisor(self) -> None:
        self._trouble_router(0.0)
        process = self.deployment.router.process
        self._do("kill", "routers' supervisor", process.pid if process else 0)

    async def _freeze_router(self) -> None:
        self._trouble_router(FROZEN_S[1])
        await self._freeze("router process", self._router_process())

    async def _freeze_client(self) -> None:
        """A client that stops reading for good, with a long answer under way, and is killed in the end."""
        argv = ["-m", "cli.main", "generate", "def merge(", "--address", self.deployment.router_address]
        client = await asyncio.create_subprocess_exec(
            sys.executable,
            *(*argv, "--max-tokens", "1500", "--ignore-eos", "--n", "2"),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        await asyncio.sleep(self.rng.uniform(1.0, 3.0))  # it starts, and reads for a while
        self._do("freeze", "client", client.pid, signal.SIGSTOP)
        await asyncio.sleep(CLIENT_LIFE_S)
        with contextlib.suppress(ProcessLookupError):
            client.kill()
        await client.wait()

    async def _freeze(self, what: str, pid: int) -> None:
        if pid in self._frozen:
            return
        self._do("freeze", what, pid, signal.SIGSTOP)
        self._frozen.add(pid)
        await asyncio.sleep(self.rng.uniform(*FROZEN_S))
        self._frozen.discard(pid)
        self._signal(pid, signal.SIGCONT)

    def _do(self, verb: str, what: str, pid: int, number: int = signal.SIGKILL) -> None:
        if pid and self._signal(pid, number):
            self.counts[f"{verb} {what}"] += 1

    @staticmethod
    def _signal(pid: int, number: int) -> bool:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return False
        return True

    def _any_worker(self) -> ManagedProcess:
        return self.rng.choice([*self.deployment.prefill, *self.deployment.decode])

    async def _rank_of(self, worker: ManagedProcess) -> int:
        """0 if it has none, or does not answer now."""
        try:
            pids = (await self.deployment.status(worker, 2.0)).rank_pids
        except grpc.aio.AioRpcError:
            return 0
        return self.rng.choice(pids) if pids else 0

    def _router_process(self) -> int:
        """One of those behind the port; 0 if there is none."""
        process = self.deployment.router.process
        try:
            children = psutil.Process(process.pid).children() if process else []
        except psutil.NoSuchProcess:
            return 0
        return self.rng.choice(children).pid if children else 0

    def _trouble_router(self, lasting_s: float) -> None:
        until_s = time.monotonic() + lasting_s + ROUTER_RECOVERY_S
        self._router_trouble_until_s = max(self._router_trouble_until_s, until_s)
