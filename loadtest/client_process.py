"""A client process of a load test: `python -m loadtest.client_process`, told by its standard input what to send.

It alone talks to the target, so that neither the progress bar nor the book-keeping delays a request. SIGTERM ends the
run early; SIGINT is left to the generator, which shares the terminal.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator

from common.errors import BatonError, InternalError
from common.quiet_collector import quiet_collector
from common.rpc.status import find_baton_error
from loadtest.client_messages import (
    MAX_REQUEST_BYTES,
    ClientSpec,
    Failed,
    Finished,
    FromClient,
    PlanEnd,
    Ready,
    Recorded,
    Start,
    to_client,
    to_line,
)
from loadtest.clock import MonotonicClock
from loadtest.prompts import PromptMaker
from loadtest.sender import Sender
from loadtest.targets.registry import open_target
from loadtest.workload import PlannedRequest


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> int:
    """One run. Returns the exit status; what went wrong has been told to the generator."""

    def tell(message: FromClient) -> None:
        writer.write(to_line(message))

    try:
        await _run(reader, writer)
    except (BatonError, BaseExceptionGroup) as error:
        known = find_baton_error(error)
        if known is None:
            raise
        tell(Failed(type(known).__name__, str(known)))
        return 1
    finally:
        with contextlib.suppress(ConnectionError):
            await writer.drain()
    return 0


async def _run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    spec = to_client(await reader.readline())
    if not isinstance(spec, ClientSpec):
        raise InternalError("the first message is not a specification")
    async with open_target(spec.target) as target:
        await target.describe()
        sender = Sender(
            target,
            PromptMaker(spec.prompts),
            MonotonicClock(),
            spec.options,
            lambda record: writer.write(to_line(Recorded(record))),
        )
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, sender.stop)
        writer.write(to_line(Ready()))
        start = to_client(await reader.readline())
        if not isinstance(start, Start):
            raise InternalError("the second message is not a start")
        quiet_collector()
        await _send(sender, reader, start.at_s)
    writer.write(to_line(Finished()))


async def _send(sender: Sender, reader: asyncio.StreamReader, start_s: float) -> None:
    plan_is_read = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(_stop_when_alone(sender, reader, plan_is_read))
        await sender.run(_plan(sender, reader, plan_is_read), start_s)
        watching.cancel()


async def _stop_when_alone(sender: Sender, reader: asyncio.StreamReader, plan_is_read: asyncio.Event) -> None:
    """Nothing follows the plan but the end of input, and that only if nobody wants the rest of the records."""
    await plan_is_read.wait()
    await reader.read()
    sender.stop()


async def _plan(
    sender: Sender, reader: asyncio.StreamReader, plan_is_read: asyncio.Event
) -> AsyncIterator[PlannedRequest]:
    while line := await reader.readline():
        message = to_client(line)
        if isinstance(message, PlanEnd):
            plan_is_read.set()
            return
        if not isinstance(message, PlannedRequest):
            raise InternalError(f"{type(message).__name__} among the planned requests")
        yield message
    sender.stop()


async def _main() -> int:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGINT, lambda: None)
    reader = asyncio.StreamReader(limit=MAX_REQUEST_BYTES)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    transport, protocol = await loop.connect_write_pipe(asyncio.streams.FlowControlMixin, sys.stdout)
    try:
        return await serve(reader, asyncio.StreamWriter(transport, protocol, reader, loop))
    finally:
        transport.close()


if __name__ == "__main__":
    sys.exit(asyncio.run(_main()))
