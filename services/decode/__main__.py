"""`python -m services.decode`: serves until SIGTERM or SIGINT, then finishes what is under way, within a grace."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys

from baton.v1 import decode_pb2_grpc, worker_pb2_grpc

from common.config import load_config_or_exit
from common.errors import BatonError
from common.rpc.server import RpcServer
from common.telemetry.counters import MetricsServer
from common.worker import status_service
from common.worker.status_service import StatusService
from common.worker.worker_model import read_worker_model
from services.decode.config import DecodeConfig
from services.decode.server import SERVICE_NAME, DecodeService
from services.decode.worker import DecodeWorker

_log = logging.getLogger("services.decode")
_STOP_GRACE_S = 1.0  # for calls that drain left over, to end with a status


async def serve(config: DecodeConfig) -> None:
    """The worker's life. Raises what the ranks could not be started for."""
    model = read_worker_model(config.model, config.device, config.dtype, config.block_size, config.tp_size)
    changed = asyncio.Event()
    worker = DecodeWorker(config, model, changed.set)
    status = StatusService(worker.status, worker.drain, worker.refresh)
    server = RpcServer(config.listen, max_message_bytes=config.max_message_bytes)
    server.add(decode_pb2_grpc.add_DecodeServicer_to_server, DecodeService(worker), SERVICE_NAME)
    server.add(worker_pb2_grpc.add_WorkerServicer_to_server, status, status_service.SERVICE_NAME)
    metrics = MetricsServer(worker.counters, config.metrics_port) if config.metrics_port else None
    try:
        port = await server.start()
        if not config.advertise:
            worker.advertise = f"{config.listen.rpartition(':')[0]}:{port}"
        _log.info("%s listens on %s (port %d)", config.worker_id, config.listen, port)
        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(worker.run())
            reporting = tasks.create_task(_report(changed, worker, server, status))
            await _stop_signal()
            _log.info("%s drains", config.worker_id)
            worker.drain()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(config.drain_timeout_s):
                    await worker.engine.wait_idle()
            status.close()
            worker.sessions.end_all()
            await server.stop(_STOP_GRACE_S)
            reporting.cancel()
            running.cancel()
    finally:
        await server.stop(0.0)
        if metrics is not None:
            metrics.stop()


async def _report(changed: asyncio.Event, worker: DecodeWorker, server: RpcServer, status: StatusService) -> None:
    """Pass changes on to whoever watches: status streams and health checks."""
    was_ready = False
    while True:
        await changed.wait()
        changed.clear()
        status.notify()
        if worker.is_ready is not was_ready:
            was_ready = worker.is_ready
            await server.set_serving(was_ready)


async def _stop_signal() -> None:
    loop = asyncio.get_running_loop()
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()


def main() -> int:
    """Returns the exit status: 1 if there is nothing to serve."""
    config = load_config_or_exit(DecodeConfig, sys.argv[1:], os.environ)
    logging.basicConfig(level=config.log_level, format="%(asctime)s %(levelname)s decode %(name)s: %(message)s")
    failures: list[BatonError] = []
    try:
        asyncio.run(serve(config))
    except* BatonError as group:
        failures = _leaves(group)
    for failure in failures:
        _log.error("%s: %s", type(failure).__name__, failure)
    return 1 if failures else 0


def _leaves(group: BaseExceptionGroup[BatonError]) -> list[BatonError]:
    found: list[BatonError] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


if __name__ == "__main__":
    sys.exit(main())
