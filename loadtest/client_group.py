"""The client processes of one run, seen from the generator: started together, fed, listened to, ended.

Requests are dealt in turn, each process taking every n-th. Knows the messages, not what is behind them.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from common import errors
from common.errors import BatonError, InternalError, Unavailable
from loadtest.client_messages import (
    MAX_RECORD_BYTES,
    ClientSpec,
    Failed,
    Finished,
    FromClient,
    PlanEnd,
    Ready,
    Recorded,
    Start,
    from_client,
    to_line,
)
from loadtest.record import RequestRecord
from loadtest.workload import Workload

_READY_S = 60.0
_END_S = 5.0  # from "finished", or from being told to stop, to the end of a process
_COMMAND = (sys.executable, "-m", "loadtest.client_process")


class ClientGroup:
    """Processes that are ready to send."""

    def __init__(self, processes: list[asyncio.subprocess.Process]) -> None:
        self._processes = processes

    async def run(
        self, workload: Workload, start_s: float, until_s: float | None, on_record: Callable[[RequestRecord], None]
    ) -> None:
        """Send the workload from `start_s` of the monotonic clock on; returns when every request has ended.

        Raises what a process failed of, and `InternalError` if the run is not over at `until_s`.
        """
        try:
            async with asyncio.timeout_at(until_s), asyncio.TaskGroup() as tasks:
                for position, process in enumerate(self._processes):
                    tasks.create_task(self._feed(process, workload, position, start_s))
                    tasks.create_task(_listen(process, on_record))
        except TimeoutError as error:
            raise InternalError("the client processes did not end in time") from error

    def stop(self) -> None:
        """Send nothing more and end what is in flight as `Interrupted`; `run` then returns."""
        for process in self._processes:
            if process.returncode is None:
                process.terminate()

    async def _feed(
        self, process: asyncio.subprocess.Process, workload: Workload, position: int, start_s: float
    ) -> None:
        assert process.stdin is not None
        # A process that ended early, because it was stopped or has failed, has told why on its other pipe.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            process.stdin.write(to_line(Start(start_s)))
            for request in itertools.islice(workload, position, None, len(self._processes)):
                process.stdin.write(to_line(request))
                await process.stdin.drain()
            process.stdin.write(to_line(PlanEnd()))
            await process.stdin.drain()


@asynccontextmanager
async def client_group(specs: list[ClientSpec]) -> AsyncIterator[ClientGroup]:
    """Start one process for each specification and wait until all can reach the target. None is left at the end."""
    processes: list[asyncio.subprocess.Process] = []
    try:
        for spec in specs:
            pipe = asyncio.subprocess.PIPE
            # In a group of its own, so that Ctrl-C in a terminal reaches us alone: it would end a client that starts.
            process = await asyncio.create_subprocess_exec(
                *_COMMAND, stdin=pipe, stdout=pipe, limit=MAX_RECORD_BYTES, process_group=0
            )
            processes.append(process)
            assert process.stdin is not None
            process.stdin.write(to_line(spec))
        for process in processes:
            await _wait_ready(process)
        yield ClientGroup(processes)
    finally:
        await asyncio.gather(*(_end(process) for process in processes))


async def _wait_ready(process: asyncio.subprocess.Process) -> None:
    try:
        async with asyncio.timeout(_READY_S):
            message = await _next_message(process)
    except TimeoutError as error:
        raise Unavailable(f"a client process was not ready after {_READY_S:g} s") from error
    if not isinstance(message, Ready):
        raise InternalError(f"a client process said {type(message).__name__} before it was ready")


async def _listen(process: asyncio.subprocess.Process, on_record: Callable[[RequestRecord], None]) -> None:
    while not isinstance(message := await _next_message(process), Finished):
        if isinstance(message, Recorded):
            on_record(message.record)


async def _next_message(process: asyncio.subprocess.Process) -> FromClient:
    assert process.stdout is not None
    line = await process.stdout.readline()
    if not line:
        raise InternalError(f"client process {process.pid} ended without a word (status {await process.wait()})")
    message = from_client(line)
    if isinstance(message, Failed):
        raise _named_error(message)
    return message


def _named_error(message: Failed) -> BatonError:
    error_class = getattr(errors, message.error, BatonError)
    if error_class is errors.InvalidArgument:
        return errors.InvalidArgument("client process", "", message.message)
    error: BatonError = error_class(message.message)
    return error


async def _end(process: asyncio.subprocess.Process) -> None:
    """Let a process end by itself, as it does without input; kill it if it does not."""
    if process.stdin is not None:
        process.stdin.close()
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
