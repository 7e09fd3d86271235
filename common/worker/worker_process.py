"""The life of a worker's process: serve until SIGTERM or SIGINT, then finish what is under way, within a grace.

Knows that a worker has a gRPC service beside its status, not which.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import grpc
from baton.v1 import worker_pb2_grpc

from common.config import load_config_or_exit
from common.errors import BatonError
from common.for_good import for_good
from common.loop_watchdog import watch_loop
from common.parent_death import PARENT_GONE, end_with_parent
from common.quiet_collector import quiet_collector
from common.rpc.server import RpcServer
from common.stop_signals import StopSignals
from common.telemetry.metrics_server import MetricsServer
from common.telemetry.request_log import configure_logging
from common.telemetry.tracing import open_tracing
from common.worker import status_service
from common.worker.status_service import StatusService
from common.worker.worker_config import WorkerConfig
from common.worker.worker_front import WorkerFront

_log = logging.getLogger(__name__)
_TOKEN_BYTES = 5  # of a token id in a message, at most
_SEQUENCE_BYTES = 1 << 18  # of all else about a sequence, at most: see common.sampling.limits
_STOP_GRACE_S = 1.0  # for calls that drain left over, to end with a status
_TRACING_GRACE_S = 2.0  # for the last spans

_Config = TypeVar("_Config", bound=WorkerConfig)
_Servicer = TypeVar("_Servicer")


def run_worker(config_class: type[_Config], serve: Callable[[_Config], Coroutine[Any, Any, None]]) -> int:
    """Load the settings and serve. Returns the exit status: 1 if there is nothing to serve."""
    config = load_config_or_exit(config_class, sys.argv[1:], os.environ)
    configure_logging(config.log_level, config.service)
    end_with_parent(os.environ, PARENT_GONE)
    failures: list[BatonError] = []
    try:
        asyncio.run(serve(config))
    except* BatonError as group:
        failures = _leaves(group)
    for failure in failures:
        _log.error("%s: %s: %s", config.worker_id, type(failure).__name__, failure)
    return 1 if failures else 0


async def serve_worker(
    worker: WorkerFront[Any, Any],
    changed: asyncio.Event,
    add_service: Callable[[_Servicer, grpc.aio.Server], None],
    servicer: _Servicer,
    service_name: str,
) -> None:
    """The worker, its service and its status, until a signal; another one cuts draining short. `changed` is set
    whenever the status may have changed.

    Raises what the ranks could not be started for.
    """
    config = worker.config
    signals = StopSignals()
    status = StatusService(worker.status, worker.drain, worker.refresh)
    # A router's session carries the sequences of all its clients: no prompt that the model can take may break it.
    longest_bytes = worker.model.config.context_length * _TOKEN_BYTES + _SEQUENCE_BYTES
    server = RpcServer(
        config.listen,
        max_message_bytes=max(config.max_message_bytes, longest_bytes),
        max_request_bytes=longest_bytes,  # nobody has more to say
    )
    server.add(add_service, servicer, service_name)
    server.add(worker_pb2_grpc.add_WorkerServicer_to_server, status, status_service.SERVICE_NAME)
    metrics = MetricsServer(worker.counters, config.metrics_port, config.metrics_address)
    worker.tracing = open_tracing(config.otlp_endpoint, config.trace_sample_ratio, config.service, config.worker_id)
    try:
        if config.metrics_port:
            await metrics.start()
        port = await server.start()
        worker.listens_on(port)
        quiet_collector()
        _log.info("%s listens on %s (port %d)", config.worker_id, config.listen, port)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(server.run())
            running = tasks.create_task(for_good(worker.run(), "the worker"))
            reporting = tasks.create_task(for_good(_report(changed, worker, server, status), "the status"))
            beating = tasks.create_task(for_good(status.run(), "the heartbeat"))
            watching = tasks.create_task(watch_loop(config.max_standstill_s))
            await signals.stopping.wait()
            _log.info("%s drains", config.worker_id)
            worker.drain()
            await signals.unless_hurried(_drained(worker))
            status.close()
            worker.end_streams()
            await server.stop(_STOP_GRACE_S)
            for task in (watching, beating, reporting, running):
                task.cancel()
    finally:
        await server.stop(0.0)
        await metrics.stop()
        worker.tracing.close(_TRACING_GRACE_S)


async def _report(
    changed: asyncio.Event, worker: WorkerFront[Any, Any], server: RpcServer, status: StatusService
) -> None:
    """Pass changes on to whoever watches: status streams and health checks."""
    was_ready = False
    while True:
        await changed.wait()
        changed.clear()
        status.notify()
        if worker.is_ready is not was_ready:
            was_ready = worker.is_ready
            server.set_serving(was_ready)


async def _drained(worker: WorkerFront[Any, Any]) -> None:
    if not await worker.wait_idle(worker.config.drain_timeout_s):
        _log.warning("%s ends with work under way: its time to drain is up", worker.config.worker_id)


def _leaves(group: BaseExceptionGroup[BatonError]) -> list[BatonError]:
    found: list[BatonError] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found
