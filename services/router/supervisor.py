"""Several router processes behind one port: starts them, starts those that die again, and stops them together.

The kernel spreads connections over the processes (SO_REUSEPORT), also to one that is stopped: that one is killed. They
drain and end when their supervisor is gone. Knows nothing of what the processes do.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Sequence

from common.config import split_address
from common.parent_death import environment_of_child
from common.stop_signals import StopSignals
from common.stopped_process import wait_stopped
from common.worker.free_port import require_free
from services.router.config import RouterConfig

_logger = logging.getLogger(__name__)

FIRST_RESTART_S = 0.5
LAST_RESTART_S = 10.0
STOP_GRACE_S = 5.0  # beyond the time to drain
HEALTHY_AFTER_S = 30.0  # a process that lived so long starts again without a growing delay


def child_argv(argv: Sequence[str], config: RouterConfig, index: int) -> list[str]:
    """The arguments of the index-th process: those of the parent, and what differs."""
    metrics_port = config.metrics_port + index if config.metrics_port else 0
    return [*argv, "--processes", "1", "--reuse-port", "--metrics-port", str(metrics_port)]


async def supervise(command: Sequence[str], argv: Sequence[str], config: RouterConfig) -> None:
    """Run `config.processes` children of `command` until SIGTERM or SIGINT, which is passed on to them; so is another.

    Raises `FailedPrecondition` if a port is somebody else's: children, which share theirs, would share it with him.
    """
    require_free(*split_address(config.listen))
    for index in range(config.processes if config.metrics_port else 0):
        require_free(config.metrics_address, config.metrics_port + index)
    signals = StopSignals()
    async with asyncio.TaskGroup() as children:
        for index in range(config.processes):
            arguments = [*command, *child_argv(argv, config, index)]
            children.create_task(_keep_running(arguments, signals, config.drain_timeout_s))


async def _keep_running(arguments: Sequence[str], signals: StopSignals, drain_timeout_s: float) -> None:
    restart_s = FIRST_RESTART_S
    loop = asyncio.get_running_loop()
    stop = asyncio.create_task(signals.stopping.wait())
    while not signals.stopping.is_set():
        started_s = loop.time()
        child = await asyncio.create_subprocess_exec(*arguments, env=environment_of_child())
        died = asyncio.create_task(child.wait())
        stopped = asyncio.create_task(wait_stopped(child.pid))
        try:
            await asyncio.wait((died, stop, stopped), return_when=asyncio.FIRST_COMPLETED)
            if stopped.done() and not died.done():
                _logger.error("process %d is stopped", child.pid)
                child.kill()
                await died
        finally:
            stopped.cancel()
            # Also when this task is cancelled, because another child could not be started.
            if not died.done():
                await _stop(child, died, drain_timeout_s, signals)
        if signals.stopping.is_set():
            return
        _logger.error("process %d ended with status %s", child.pid, child.returncode)
        if loop.time() - started_s > HEALTHY_AFTER_S:
            restart_s = FIRST_RESTART_S
        await asyncio.wait((stop,), timeout=restart_s)
        restart_s = min(2 * restart_s, LAST_RESTART_S)


async def _stop(
    child: asyncio.subprocess.Process, died: asyncio.Task[int], drain_timeout_s: float, signals: StopSignals
) -> None:
    """SIGTERM, once more if we are told to hurry, and SIGKILL for one that does not end in its time."""
    for grace_s, hurry in ((drain_timeout_s + STOP_GRACE_S, signals.hurrying), (STOP_GRACE_S, asyncio.Event())):
        if child.returncode is None:
            child.send_signal(signal.SIGTERM)
            await _wait_first(died, hurry, grace_s)
    if not died.done() and child.returncode is None:
        child.kill()
    await died


async def _wait_first(died: asyncio.Task[int], hurry: asyncio.Event, timeout_s: float) -> None:
    hurrying = asyncio.create_task(hurry.wait())
    await asyncio.wait((died, hurrying), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    hurrying.cancel()


def own_command() -> list[str]:
    """How this very module was started, without its arguments."""
    return [sys.executable, "-m", "services.router"]
