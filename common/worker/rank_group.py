"""The rank processes of one worker, seen from its front: start, talk, notice their death, stop.

A group lives and dies as a whole: when one rank is lost, every call and wait raises `Unavailable` and the owner stops
the group and starts another. Knows nothing of sequences or of what a plan means.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import signal
import socket
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from common import errors
from common.parent_death import environment_of_child
from common.stopped_process import wait_stopped
from common.worker.framing import AsyncFrames
from common.worker.rank_exit import described_exit
from common.worker.rank_messages import (
    FrontKVMessage,
    FrontStepMessage,
    RankFailed,
    RankKVMessage,
    RankReady,
    RankStepMessage,
    StartRank,
)
from common.worker.stderr_relay import StderrRelay
from common.worker.step_plan import StepResult

_log = logging.getLogger(__name__)
MAX_UNREAD_RESULTS = 16  # fronts have two steps under way
_EXIT_TIMEOUT_S = 1.0  # for a process whose channels are closed to be gone
_step_decoder: msgspec.msgpack.Decoder[RankStepMessage] = msgspec.msgpack.Decoder(RankStepMessage)
_kv_decoder: msgspec.msgpack.Decoder[RankKVMessage] = msgspec.msgpack.Decoder(RankKVMessage)


def error_of(kind: str, detail: str) -> errors.BatonError:
    """The error that a rank reported by class name; `InternalError` for a name that the tree does not have."""
    found = getattr(errors, kind, None)
    if isinstance(found, type) and issubclass(found, errors.BatonError) and kind != "InvalidArgument":
        return found(detail)
    return errors.InternalError(f"{kind}: {detail}")


class Operation:
    """One operation on a rank's KV channel: its replies, in order. Close it when no more replies are expected."""

    def __init__(self, owner: _Rank, op_id: int) -> None:
        self.op_id = op_id
        self._owner = owner
        self._replies: deque[RankKVMessage] = deque()
        self._arrived = asyncio.Event()
        self._lost: str | None = None

    async def reply(self) -> RankKVMessage:
        """The next reply. Raises `Unavailable` if the rank is lost. Cancelling it loses nothing."""
        while not self._replies:
            if self._lost is not None:
                raise errors.RanksLost(self._lost)
            self._arrived.clear()
            await self._arrived.wait()
        return self._replies.popleft()

    def close(self) -> None:
        """Forget the operation; later replies are dropped. Idempotent."""
        self._owner.operations.pop(self.op_id, None)

    def deliver(self, message: RankKVMessage) -> None:
        self._replies.append(message)
        self._arrived.set()

    def lose(self, reason: str) -> None:
        self._lost = reason
        self._arrived.set()


@dataclass(slots=True)
class _Rank:
    """One process and its two channels."""

    process: asyncio.subprocess.Process
    steps: AsyncFrames
    kv: AsyncFrames
    operations: dict[int, Operation]
    stderr: StderrRelay
    relaying: asyncio.Task[None]
    ready: RankReady | None = None

    async def end(self) -> str:
        """How the process ended, which its channels told before its exit did."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_EXIT_TIMEOUT_S):
                await self.process.wait()
                await asyncio.wait({self.relaying})
        return described_exit(self.process.returncode, self.stderr.tail)


class RankGroup:
    """All ranks of a worker. Use `start`, then `async with group:`; leaving it stops the processes."""

    def __init__(self) -> None:
        self.has_served = False  # a step, at least
        self._ranks: list[_Rank] = []
        # None, for which there is always a place: the group is lost.
        self._results: asyncio.Queue[StepResult | None] = asyncio.Queue(MAX_UNREAD_RESULTS + 1)
        self._lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._op_ids = itertools.count(1)
        self._readers: list[asyncio.Task[None]] = []

    @classmethod
    async def start(cls, module: str, specs: Sequence[StartRank], timeout_s: float) -> RankGroup:
        """Start `python -m module` once for each spec and wait until all of them are ready.

        Raises `ModelError` (or what else a rank reports), `Unavailable` if one dies, is stopped or the time is up.
        Whatever goes wrong, no process is left behind.
        """
        group = cls()
        try:
            async with asyncio.timeout(timeout_s):
                for _ in specs:
                    group._ranks.append(await _spawn(module))
                for rank, spec in zip(group._ranks, specs, strict=True):
                    rank.steps.send(spec)
                await group._await_all_ready()
        except TimeoutError as error:
            await group.stop(grace_s=0.0)
            raise errors.Unavailable(f"ranks were not ready after {timeout_s:.0f} s") from error
        except BaseException:
            await group.stop(grace_s=0.0)
            raise
        for index, rank in enumerate(group._ranks):
            for read in (group._read_steps, group._read_kv):
                group._readers.append(asyncio.create_task(group._read(read, index, rank)))
        return group

    @property
    def infos(self) -> list[RankReady]:
        """What each rank reported when it was ready, in order of rank."""
        return [rank.ready for rank in self._ranks if rank.ready is not None]

    @property
    def pids(self) -> list[int]:
        """Process ids, in order of rank."""
        return [rank.process.pid for rank in self._ranks]

    @property
    def lost_reason(self) -> str | None:
        """Why the group is lost, or None while it stands."""
        return self._lost.result() if self._lost.done() else None

    async def wait_lost(self) -> str:
        """Wait until a rank is lost; says why."""
        return await asyncio.shield(self._lost)

    def submit(self, message: FrontStepMessage) -> None:
        """Send a step message to every rank, in order. Messages to a lost group vanish: `next_result` says so."""
        for rank in self._ranks:
            rank.steps.send(message)

    async def next_result(self) -> StepResult:
        """The next plan's result, from rank 0. Raises `Unavailable` if the group is lost. One caller at a time."""
        result = await self._results.get()
        if result is None:
            self._results.put_nowait(None)  # for every later call
            raise errors.RanksLost(self._lost.result())
        return result

    def next_op_id(self) -> int:
        """A number for a KV operation."""
        return next(self._op_ids)

    def begin(self, rank: int, message: FrontKVMessage) -> Operation:
        """Send a KV message to one rank; its replies arrive at the operation. Raises `Unavailable` if lost."""
        if self._lost.done():
            raise errors.RanksLost(self._lost.result())
        target = self._ranks[rank]
        operation = Operation(target, message.op_id)
        target.operations[message.op_id] = operation
        target.kv.send(message)
        return operation

    def follow_up(self, rank: int, message: FrontKVMessage) -> None:
        """Send a message about an operation that is open already; its reply arrives at that operation."""
        self._ranks[rank].kv.send(message)

    def lose(self, reason: str) -> None:
        """The group is of no use any more: every call and wait raises `Unavailable`. The first reason stays."""
        if self._lost.done():
            return
        self._lost.set_result(reason)
        self._results.put_nowait(None)
        for rank in self._ranks:
            for operation in rank.operations.values():
                operation.lose(reason)

    async def stop(self, grace_s: float) -> None:
        """Close the channels, which ends the ranks, and kill what is left after `grace_s` seconds. Idempotent."""
        self.lose("the worker is stopping")
        for task in self._readers:
            task.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        self._readers.clear()
        channels = [channel for rank in self._ranks for channel in (rank.steps, rank.kv)]
        for channel in channels:
            channel.begin_close()
        await asyncio.gather(*(_end(rank.process, grace_s) for rank in self._ranks))
        await _end_relays([rank.relaying for rank in self._ranks])
        for channel in channels:  # now only: a rank that hangs does not read what is queued for it
            await channel.close()
        self._ranks.clear()

    async def __aenter__(self) -> RankGroup:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop(grace_s=2.0)

    async def _await_all_ready(self) -> None:
        """A rank that was stopped (SIGSTOP) ends the wait, ready or not: the others may wait for it."""
        starting = asyncio.gather(*(self._await_ready(rank) for rank in self._ranks))
        stopped = [asyncio.create_task(wait_stopped(rank.process.pid)) for rank in self._ranks]
        tasks: set[asyncio.Future[Any]] = {starting, *stopped}
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if not starting.done():
                index = next(index for index, watch in enumerate(stopped) if watch.done())
                pid = self._ranks[index].process.pid
                raise errors.Unavailable(f"rank {index} (process {pid}) was stopped while starting")
            starting.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _await_ready(self, rank: _Rank) -> None:
        frame = await rank.steps.receive()
        if frame is None:
            raise errors.Unavailable(f"rank process {rank.process.pid} died while starting: it {await rank.end()}")
        message = _step_decoder.decode(frame)
        if isinstance(message, RankFailed):
            raise error_of(message.kind, message.detail)
        assert isinstance(message, RankReady)
        rank.ready = message

    async def _read(self, read: Callable[[int, _Rank], Awaitable[None]], index: int, rank: _Rank) -> None:
        """One channel of one rank. What cannot be read ends the group: its other messages cannot be trusted."""
        try:
            await read(index, rank)
        except Exception as error:
            _log.exception("rank %d (process %d) sent what cannot be read", index, rank.process.pid)
            self.lose(f"rank {index} sent what cannot be read: {error!r}")

    async def _read_steps(self, index: int, rank: _Rank) -> None:
        while (frame := await rank.steps.receive()) is not None:
            message = _step_decoder.decode(frame)
            if isinstance(message, StepResult):
                self.has_served = True
                if self._results.qsize() >= MAX_UNREAD_RESULTS:
                    self.lose(f"rank {index} sent results of steps that nobody asked for")
                    return
                self._results.put_nowait(message)
            elif isinstance(message, RankFailed):
                self.lose(f"rank {index} failed: {message.kind}: {message.detail}")
                return
        self.lose(f"rank {index} (process {rank.process.pid}) {await rank.end()}")

    async def _read_kv(self, index: int, rank: _Rank) -> None:
        while (frame := await rank.kv.receive()) is not None:
            message = _kv_decoder.decode(frame)
            operation = rank.operations.get(message.op_id)
            if operation is not None:
                operation.deliver(message)
        self.lose(f"rank {index} (process {rank.process.pid}) {await rank.end()}")


async def _spawn(module: str) -> _Rank:
    step_front, step_rank = socket.socketpair()
    kv_front, kv_rank = socket.socketpair()
    try:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            module,
            str(step_rank.fileno()),
            str(kv_rank.fileno()),
            pass_fds=(step_rank.fileno(), kv_rank.fileno()),
            stdin=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            env=environment_of_child() | {"UCX_WARN_UNUSED_ENV_VARS": "n"},
        )
    except BaseException:
        step_front.close()
        kv_front.close()
        raise
    finally:
        step_rank.close()
        kv_rank.close()
    assert process.stderr is not None
    stderr = StderrRelay(process.stderr)
    relaying = asyncio.create_task(stderr.run())
    steps, kv = await AsyncFrames.open(step_front), await AsyncFrames.open(kv_front)
    return _Rank(process, steps, kv, {}, stderr, relaying)


async def _end_relays(relays: list[asyncio.Task[None]]) -> None:
    """They end with the processes, unless a child of one lives on."""
    if relays:
        await asyncio.wait(relays, timeout=_EXIT_TIMEOUT_S)
    for relay in relays:
        relay.cancel()
    await asyncio.gather(*relays, return_exceptions=True)


async def _end(process: asyncio.subprocess.Process, grace_s: float) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(grace_s):
            await process.wait()
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        await process.wait()
