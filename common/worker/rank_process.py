"""A rank process: its main thread computes steps, a second thread moves KV bytes on its own event loop.

Both take orders from the front over a local socket each and never decide anything. The end of the step channel is the
end of the process. What the KV thread does is the service's own: it passes a `KVService` factory. On a GPU the main
thread only launches steps, and a third thread sends their results.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import msgspec
import torch

from common.parent_death import end_with_parent
from common.quiet_collector import quiet_collector
from common.transport.base import Endpoint
from common.transport.registry import open_endpoint
from common.transport.ucx_worker import Progress
from common.worker.framing import AsyncFrames, BlockingFrames
from common.worker.model_runner import Pending, Runner
from common.worker.rank_messages import (
    FrontKVMessage,
    FrontStepMessage,
    RankFailed,
    RankKVMessage,
    RankReady,
    StartRank,
)
from common.worker.rank_runtime import RankRuntime, build_runtime
from common.worker.result_thread import ResultThread
from common.worker.step_plan import AddRow, RemoveRow, StepPlan

_log = logging.getLogger(__name__)
_SWITCH_INTERVAL_S = 0.0005  # no thread keeps the others from the interpreter for longer; Python's default is 5 ms
_step_decoder: msgspec.msgpack.Decoder[FrontStepMessage] = msgspec.msgpack.Decoder(FrontStepMessage)
_kv_decoder: msgspec.msgpack.Decoder[FrontKVMessage] = msgspec.msgpack.Decoder(FrontKVMessage)


class KVService(Protocol):
    """The rank's side of the hand-off: `kv_sender` in prefill, `kv_receiver` in decode."""

    def handle(self, message: FrontKVMessage) -> None:
        """Start an operation; its replies go out through the context's `reply`. Never blocks, never raises."""
        ...

    async def close(self) -> None:
        """End every operation."""
        ...


@dataclass(frozen=True, slots=True)
class KVContext:
    """What a KV service works with. `slots`: staging memory, uint8 [num_slots, slot_bytes] on the rank's device."""

    endpoint: Endpoint
    runtime: RankRuntime
    slots: torch.Tensor
    start: StartRank
    reply: Callable[[RankKVMessage], None]


KVServiceFactory = Callable[[KVContext], KVService]


def run_rank(argv: list[str], make_kv_service: KVServiceFactory) -> int:
    """Body of `python -m services.<service>.rank STEP_FD KV_FD`. Returns the exit status."""
    end_with_parent(os.environ)  # also while it is inside a collective
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the front stops us
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    step_fd, kv_fd = (int(value) for value in argv)
    step_socket = socket.socket(fileno=step_fd)
    frames = BlockingFrames(step_socket)
    frame = frames.receive()
    if frame is None:
        return 0
    start = _step_decoder.decode(frame)
    assert isinstance(start, StartRank)
    try:
        runtime = build_runtime(start)
        kv_thread = _KVThread(kv_fd, start, runtime, make_kv_service)
        address = kv_thread.start_and_wait()
    except Exception as error:  # the process edge: whatever it is, the front must know why this rank does not start
        _log.exception("rank %d cannot start", start.rank)
        frames.send(_failure(start.rank, error))
        return 1
    quiet_collector()
    frames.send(_ready(start.rank, address, runtime))
    try:
        if runtime.device.type == "cuda":
            return _launch_loop(frames, step_socket, start.rank, runtime)
        return _step_loop(frames, start.rank, runtime)
    finally:
        kv_thread.stop()
        if runtime.marks is not None:
            runtime.marks.close()


def _step_loop(frames: BlockingFrames, rank: int, runtime: RankRuntime) -> int:
    """Each step is computed and answered before the next message is read."""
    while (frame := frames.receive()) is not None:
        try:
            pending = _apply(_step_decoder.decode(frame), runtime.runner)
            if pending is not None:
                result = pending.result()
                if rank == 0:
                    frames.send(result)
        except BrokenPipeError:
            return 0
        except Exception as error:  # the process edge: whatever it is, the front must know why this rank ended
            _log.exception("rank %d failed", rank)
            frames.send(_failure(rank, error))
            return 1
    return 0


def _launch_loop(frames: BlockingFrames, step_socket: socket.socket, rank: int, runtime: RankRuntime) -> int:
    """Steps are launched as their plans arrive, so that the device never waits; another thread awaits them."""

    def interrupt() -> None:
        with contextlib.suppress(OSError):
            step_socket.shutdown(socket.SHUT_RD)

    results = ResultThread(rank, rank == 0, frames.send, interrupt)
    while (frame := frames.receive()) is not None:
        try:
            pending = _apply(_step_decoder.decode(frame), runtime.runner)
        except Exception as error:  # as in `_step_loop`; the front learns of it behind the results before
            results.fail(error)
            break
        if pending is not None:
            results.put(pending)
    return 0 if results.close() else 1


def _apply(message: FrontStepMessage, runner: Runner) -> Pending | None:
    """Do what the front says; returns the step if one was launched."""
    if isinstance(message, StepPlan):
        return runner.launch(message)
    if isinstance(message, AddRow):
        runner.add_row(message)
    elif isinstance(message, RemoveRow):
        runner.remove_row(message.row)
    return None


class _KVThread:
    """The event loop of transport and staging slots, in a thread of its own."""

    def __init__(self, kv_fd: int, start: StartRank, runtime: RankRuntime, make_kv_service: KVServiceFactory) -> None:
        self._socket = socket.socket(fileno=kv_fd)
        self._start = start
        self._runtime = runtime
        self._make_kv_service = make_kv_service
        self._address = ""
        self._error: BaseException | None = None
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kv", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._main: asyncio.Task[None] | None = None

    def start_and_wait(self) -> str:
        """Start the thread; returns the transport address. Raises what opening the endpoint raised."""
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            raise self._error
        return self._address

    def stop(self) -> None:
        """End the loop and join the thread."""
        if self._loop is not None and self._main is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._main.cancel)
        self._thread.join(timeout=2.0)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            if self._started.is_set():
                _log.exception("the KV thread of rank %d failed", self._start.rank)
                os._exit(1)  # the front sees both channels close and replaces the worker's ranks
            self._error = error
        finally:
            self._started.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._main = asyncio.current_task()
        frames = await AsyncFrames.open(self._socket)
        endpoint = await open_endpoint(
            self._start.transport_url,
            self._start.peer_name,
            progress=Progress(self._start.transport_progress),
            memory=str(self._runtime.device) if self._runtime.device.type == "cuda" else "host",
            listens=self._start.listens,
        )
        slots = torch.empty(
            (self._start.num_slots, self._start.slot_bytes), dtype=torch.uint8, device=self._runtime.device
        )
        service = self._make_kv_service(KVContext(endpoint, self._runtime, slots, self._start, frames.send))
        self._address = endpoint.address
        self._started.set()
        try:
            while (frame := await frames.receive()) is not None:
                service.handle(_kv_decoder.decode(frame))
        finally:
            await service.close()
            await endpoint.close()
            await frames.close()


def _ready(rank: int, address: str, runtime: RankRuntime) -> RankReady:
    return RankReady(
        rank=rank,
        transport_address=address,
        layout_fingerprint=runtime.layout_fingerprint,
        num_parameters=runtime.num_parameters,
        kv_bytes=runtime.kv_bytes,
    )


def _failure(rank: int, error: BaseException) -> RankFailed:
    return RankFailed(rank, type(error).__name__, str(error))
