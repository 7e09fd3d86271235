"""A whole deployment on this machine: router, prefill and decode workers as processes of their own.

A process that dies is reported and started again with the same arguments, but for one that dies before the whole
deployment was ready: that is a wrong start, which `ready` tells. Nothing outlives `stop`. Used by `baton up`, `baton
demo`, the benchmarks and the integration tests. Knows command lines, not requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import grpc
from baton.v1 import inference_pb2, inference_pb2_grpc, worker_pb2, worker_pb2_grpc

from cli import preflight
from cli.deployment_spec import DeploymentSpec as DeploymentSpec
from cli.process_log import ProcessLog
from cli.worker_cells import state_of
from common.errors import InternalError, Unavailable
from common.parent_death import environment_of_child
from common.rpc.client import open_channel
from common.worker.free_port import free_ports

_EVERY_INTERFACE = "0.0.0.0"
_LOOPBACK = "127.0.0.1"
_MAX_STATUS_BYTES = 4 << 20
_STOP_GRACE_S = 5.0
_STATE_TIMEOUT_S = 1.0
_QUICK_DEATH_S = 5.0  # a process that dies sooner than this after its start is started again more slowly
_MAX_RESTART_DELAY_S = 10.0


@dataclass(slots=True)
class ManagedProcess:
    """One service process and how to start it again."""

    name: str
    role: str
    address: str
    argv: list[str]
    process: asyncio.subprocess.Process | None = None
    num_restarts: int = 0
    log: ProcessLog | None = None
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def restarted(self, timeout_s: float) -> None:
        """Wait for the next restart. Raises `TimeoutError`."""
        async with asyncio.timeout(timeout_s), self.changed:
            before = self.num_restarts
            await self.changed.wait_for(lambda: self.num_restarts > before)

    @property
    def pid(self) -> int:
        """Process id of the present process."""
        if self.process is None:
            raise InternalError(f"{self.name} is not running")
        return self.process.pid


class Deployment:
    """Use as `async with Deployment(spec) as deployment:`; entering starts the processes, leaving stops them."""

    def __init__(self, spec: DeploymentSpec, on_event: Callable[[str], None] = lambda _: None) -> None:
        self._spec = spec
        self._on_event = on_event
        self._stopping = False
        self._was_ready = False
        self._failure = ""  # of the start: who died, and of what
        self._failed = asyncio.Event()
        self._monitors: list[asyncio.Task[None]] = []
        ports = free_ports(1 + spec.num_prefill + spec.num_decode, spec.host)
        router_port = spec.router_port or ports[0]
        self._num_devices = self._num_workers = 0  # that have been given out, and named
        self.prefill = [
            self._worker("prefill", index, ports[1 + index], spec.prefill_tp, spec.prefill_args)
            for index in range(spec.num_prefill)
        ]
        self.decode = [
            self._worker("decode", index, ports[1 + spec.num_prefill + index], spec.decode_tp, spec.decode_args)
            for index in range(spec.num_decode)
        ]
        self.router = self._router(router_port)

    @property
    def processes(self) -> list[ManagedProcess]:
        """Workers first, then the router."""
        return [*self.prefill, *self.decode, self.router]

    @property
    def router_address(self) -> str:
        """Where clients connect, `host:port`."""
        return self.router.address

    @property
    def router_metrics(self) -> list[str]:
        """Where the router processes' metrics are, as URLs; none without a `metrics_port`."""
        port, count = self._spec.metrics_port, self._spec.router_processes
        return [f"http://{self._spec.host}:{port + index}/metrics" for index in range(count)] if port else []

    async def __aenter__(self) -> Deployment:
        """Raises what `preflight.check` finds, as that somebody else has the router's port: its answers would be taken
        for ours."""
        preflight.check(self._spec, os.environ)
        try:
            for process in self.processes:
                await self._start(process)
                self._monitors.append(asyncio.create_task(self._monitor(process)))
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def ready(self, timeout_s: float) -> None:
        """Wait until the router sees every worker ready.

        Raises `Unavailable` as soon as a process ends instead, or when the time is up; it says which process, and the
        last line of its log.
        """
        seeing = asyncio.create_task(self._all_seen())
        failing = asyncio.create_task(self._failed.wait())
        try:
            await asyncio.wait({seeing, failing}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if self._failure:
                raise Unavailable(self._failure)
            if not seeing.done():
                raise Unavailable(f"after {timeout_s:g} s {await self._late()}")
            seeing.result()
            self._was_ready = True
        finally:
            seeing.cancel()
            failing.cancel()
            await asyncio.gather(seeing, failing, return_exceptions=True)

    async def _all_seen(self) -> None:
        expected = (self._spec.num_prefill, self._spec.num_decode)
        async with open_channel(self.router_address, _MAX_STATUS_BYTES) as channel:
            stub = inference_pb2_grpc.InferenceStub(channel)
            while True:
                with contextlib.suppress(grpc.aio.AioRpcError):
                    info = await stub.GetModelInfo(
                        inference_pb2.GetModelInfoRequest(), timeout=1.0, wait_for_ready=True
                    )
                    if info.num_prefill_workers >= expected[0] and info.num_decode_workers >= expected[1]:
                        return
                await asyncio.sleep(0.05)  # start-up only: the model info has no stream to wait on

    async def _late(self) -> str:
        """Which processes are not ready, and why, as far as they say."""
        workers = [*self.prefill, *self.decode]
        states = await asyncio.gather(*(self._state_of(worker) for worker in workers))
        late = [
            f"{worker.name} {state}{_last_words(worker)}"
            for worker, state in zip(workers, states, strict=True)
            if state != "is ready"
        ]
        return "; ".join(late) or f"the router does not see all workers ready, which they are{_last_words(self.router)}"

    async def _state_of(self, worker: ManagedProcess) -> str:
        try:
            status = await self.status(worker, _STATE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return "does not answer"
        return f"is {state_of(status)}"

    async def status(self, worker: ManagedProcess, timeout_s: float = 5.0) -> worker_pb2.WorkerStatus:
        """One status of a worker. Raises `grpc.aio.AioRpcError` if it does not answer."""
        async with open_channel(worker.address, _MAX_STATUS_BYTES) as channel:
            stub = worker_pb2_grpc.WorkerStub(channel)
            return await stub.GetStatus(worker_pb2.GetStatusRequest(), timeout=timeout_s)

    async def stop(self) -> None:
        """Ask every process to stop, router first, and kill those that do not. Idempotent."""
        self._stopping = True
        for task in self._monitors:
            task.cancel()
        await asyncio.gather(*self._monitors, return_exceptions=True)
        self._monitors.clear()
        await asyncio.gather(*(_terminate(process) for process in reversed(self.processes)))

    def _worker(self, role: str, index: int, port: int, tp_size: int, extra: tuple[str, ...]) -> ManagedProcess:
        name = f"{role}-{index}"
        address = f"{self._spec.host}:{port}"
        flags = ["--worker-id", name, "--listen", address, "--model", str(self._spec.model)]
        if role == "decode" and self._spec.host == _EVERY_INTERFACE:
            flags += ["--advertise", f"{_LOOPBACK}:{port}"]  # all prefill workers are on this machine
        flags += self._metrics_flags(self._spec.router_processes + self._num_workers)
        self._num_workers += 1
        flags += ["--tp-size", str(tp_size), "--device", self._spec.device, "--first-device", str(self._num_devices)]
        self._num_devices += tp_size
        argv = ["-m", f"services.{role}", *flags, *extra]
        return ManagedProcess(name, role, address, argv)

    def _router(self, port: int) -> ManagedProcess:
        address = f"{self._spec.host}:{port}"
        flags = ["--listen", address, "--model", str(self._spec.model)]
        flags += ["--prefill", ",".join(worker.address for worker in self.prefill)]
        flags += ["--decode", ",".join(worker.address for worker in self.decode)]
        flags += ["--processes", str(self._spec.router_processes), *self._metrics_flags(0)]
        argv = ["-m", "services.router", *flags, *self._spec.router_args]
        return ManagedProcess("router", "router", address, argv)

    def _metrics_flags(self, index: int) -> list[str]:
        """Of the index-th process."""
        port = self._spec.metrics_port
        return ["--metrics-port", str(port + index)] if port else []

    async def _start(self, managed: ManagedProcess) -> None:
        if self._spec.log_dir is not None and managed.log is None:
            managed.log = ProcessLog(self._spec.log_dir / f"{managed.name}.log")
        output = None if managed.log is None else managed.log.begin_run()
        managed.process = await asyncio.create_subprocess_exec(
            sys.executable,
            *managed.argv,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment_of_child() | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,  # Ctrl-C in the terminal reaches only us, and we stop things in order
        )

    async def _monitor(self, managed: ManagedProcess) -> None:
        delay_s = 0.1
        while True:
            assert managed.process is not None
            started = time.monotonic()
            status = await managed.process.wait()
            if self._stopping:
                return
            self._on_event(f"{managed.name} (process {managed.pid}) ended with {_describe(status)}")
            if not self._was_ready:
                self._failure = self._failure or (
                    f"{managed.name} ended with {_describe(status)} before all was ready{_last_words(managed)}"
                )
                self._failed.set()
                return
            if not self._spec.restart:
                return
            delay_s = 0.1 if time.monotonic() - started > _QUICK_DEATH_S else min(delay_s * 2, _MAX_RESTART_DELAY_S)
            await asyncio.sleep(delay_s)
            await self._start(managed)
            async with managed.changed:
                managed.num_restarts += 1
                managed.changed.notify_all()
            self._on_event(f"{managed.name} started again as process {managed.pid}")


def _describe(status: int) -> str:
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"


def _last_words(managed: ManagedProcess) -> str:
    """What its log ends with, and where that is."""
    if managed.log is None or not (line := managed.log.last_line()):
        return ""
    return f": {line} [{managed.log.path}]"


async def _terminate(managed: ManagedProcess) -> None:
    process = managed.process
    if process is not None and process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_STOP_GRACE_S):
                await process.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # with whatever it started itself
            await process.wait()
    if managed.log is not None:
        managed.log.close()
        managed.log = None
