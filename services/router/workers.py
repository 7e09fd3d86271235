"""The workers that the router knows, by address and role. Addresses come from the settings and from a file
(`worker_list`). Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterable
from pathlib import Path

from common.awake_clock import TICK_S, AwakeClock
from services.router.moves import WorkerLife
from services.router.placement import Candidate
from services.router.worker import Worker
from services.router.worker_list import Role, WorkersFile


class WorkerRegistry:
    """All workers. `run` keeps their streams and the list itself up to date."""

    def __init__(
        self,
        prefill: Iterable[str],
        decode: Iterable[str],
        *,
        max_message_bytes: int,
        workers_file: Path | None = None,
        file_interval_s: float = 1.0,
        model_digests: frozenset[bytes] = frozenset(),
        restart_timeout_s: float = 0.0,
    ) -> None:
        """`model_digests`: of workers that serve the router's model; empty if it cannot say. `restart_timeout_s`: how
        long a worker that was ready counts as coming back."""
        self.model_digests = model_digests
        self.max_message_bytes = max_message_bytes
        self.clock = AwakeClock(time.monotonic())
        self._static = {(address, Role.PREFILL) for address in prefill}
        self._static |= {(address, Role.DECODE) for address in decode}
        self._workers_file = WorkersFile(workers_file) if workers_file is not None else None
        self._file_interval_s = file_interval_s
        self._restart_timeout_s = restart_timeout_s
        self._workers: dict[tuple[str, Role], Worker] = {}
        self._runs: dict[tuple[str, Role], asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """Something changed that candidates depend on."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait_changed(self) -> None:
        """Return at the next change."""
        await self._changed.wait()

    def candidates(self, role: Role) -> list[Candidate]:
        """The workers of a role that take requests now."""
        # A copy: metrics are read on another thread.
        found = (worker.candidate for worker in tuple(self._workers.values()) if worker.role is role)
        return [candidate for candidate in found if candidate is not None]

    def worker(self, role: Role, address: str) -> Worker:
        """The worker of a candidate that was taken from `candidates` without an await in between."""
        return self._workers[address, role]

    def life_of(self, worker: str) -> WorkerLife | None:
        """The life that the worker of another life lives now, as far as that is known."""
        lives = (known.life for known in self._workers.values())
        return next((life for life in lives if life is not None and life.worker == worker), None)

    def starts_until_s(self, role: Role, num_tokens: int) -> float:
        """Until when some worker of the role counts as on its way to take so long a sequence; see `LastSeen`."""
        listed = (worker for worker in self._workers.values() if worker.role is role and worker.listed)
        return max(
            (worker.seen.starts_until_s(num_tokens, self._restart_timeout_s) for worker in listed), default=-math.inf
        )

    @property
    def block_size(self) -> int:
        """Tokens in a block, as the first worker that is known says; 0 if none is."""
        return next((w.status.block_size for w in self._workers.values() if w.status is not None), 0)

    @property
    def has_pair(self) -> bool:
        """Whether some prefill and some decode worker could take a request together now."""
        fingerprints = [{c.layout_fingerprint for c in self.candidates(role)} for role in Role]
        return bool(fingerprints[0] & fingerprints[1])

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as runs:
            runs.create_task(self._look_after_workers())
            self._set_workers(runs, self._static)
            while self._workers_file is not None:
                listed = self._workers_file.read()
                if listed is not None:
                    self._set_workers(runs, self._static | listed)
                await asyncio.sleep(self._file_interval_s)
            await asyncio.Event().wait()

    async def _look_after_workers(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.look(time.monotonic())

    def look(self, monotonic_s: float) -> None:
        """One tick: which workers are silent?"""
        self.clock.tick(monotonic_s)
        for worker in tuple(self._workers.values()):
            worker.look()

    def drop_unlisted(self) -> None:
        """Let go of workers that are no longer listed and that no sequence uses."""
        for key, worker in list(self._workers.items()):
            if not worker.listed and worker.is_idle:
                self._runs.pop(key).cancel()
                del self._workers[key]

    def _set_workers(self, runs: asyncio.TaskGroup, wanted: set[tuple[str, Role]]) -> None:
        for key in wanted - self._workers.keys():
            worker = self._workers[key] = Worker(*key, self)
            self._runs[key] = runs.create_task(worker.run())
        for key, worker in self._workers.items():
            worker.listed = key in wanted
        self.drop_unlisted()
        self.notify()
