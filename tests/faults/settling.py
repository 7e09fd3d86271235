"""Waiting for a state of the workers, as their status RPC tells it, and asserting that nothing is left behind."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from baton.v1 import worker_pb2, worker_pb2_grpc

from cli.deployment import ManagedProcess
from common.rpc.client import open_channel

SETTLE_S = 5.0  # the promise is a second from a request's end; a machine may stand still for longer than that


class Watcher:
    """Follows one worker's status stream."""

    def __init__(self) -> None:
        self.latest = worker_pb2.WorkerStatus()
        self._changed = asyncio.Condition()

    async def follow(self, address: str) -> None:
        async with open_channel(address, 4 << 20) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            async for status in stub.WatchStatus(worker_pb2.WatchStatusRequest(min_interval_ms=1)):
                async with self._changed:
                    self.latest = status
                    self._changed.notify_all()

    async def until(self, condition: Callable[[worker_pb2.WorkerStatus], bool], timeout_s: float) -> None:
        """Wait until a status satisfies the condition. Raises `TimeoutError` with the last status shown."""
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: condition(self.latest))
        except TimeoutError as error:
            raise TimeoutError(f"last status: {self.latest}") from error


@contextlib.asynccontextmanager
async def watching(worker: ManagedProcess) -> AsyncIterator[Watcher]:
    """A watcher of one worker."""
    watcher = Watcher()
    task = asyncio.create_task(watcher.follow(worker.address))
    try:
        await watcher.until(lambda status: status.state == worker_pb2.WORKER_STATE_READY, 20.0)
        yield watcher
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def settled(*workers: ManagedProcess) -> None:
    """Require that every worker holds nothing within `SETTLE_S` from now, by statuses that are asked for only now: an
    older one may be of a time at which the request had not begun. Raises `TimeoutError`."""
    loop = asyncio.get_running_loop()
    deadline_s = loop.time() + SETTLE_S
    for worker in workers:
        async with watching(worker) as watcher:
            await watcher.until(holds_nothing, deadline_s - loop.time())


def holds_nothing(status: worker_pb2.WorkerStatus) -> bool:
    """No block, slot or queue entry is held; cached blocks are nobody's."""
    return (
        status.num_blocks_held == 0
        and status.num_slots_in_use == 0
        and status.num_slots_quarantined == 0
        and status.num_open == 0
        and status.num_waiting == 0
        and status.num_running == 0
        and status.num_grants_waiting == 0
    )
