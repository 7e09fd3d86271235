"""One router process: puts the parts together, runs them, and takes them down in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import random
import secrets
import socket
from collections.abc import AsyncIterator, Mapping

from baton.v1 import inference_pb2_grpc

from common.for_good import for_good
from common.loop_watchdog import watch_loop
from common.quiet_collector import quiet_collector
from common.rpc.server import RpcServer
from common.stop_signals import StopSignals
from common.telemetry.metrics import Level
from common.telemetry.metrics_server import MetricsServer
from common.telemetry.tracing import Tracing, open_tracing
from services.router.admission import Admission, AdmissionQueue
from services.router.config import RouterConfig
from services.router.dispatcher import Dispatcher, DispatchLimits
from services.router.metrics import RouterMetrics
from services.router.moves import MoveLimits
from services.router.served_model import ServedModel, load_served_model
from services.router.server import InferenceServicer
from services.router.worker_list import Role
from services.router.workers import WorkerRegistry

_logger = logging.getLogger(__name__)

SERVICE_NAME = "baton.v1.Inference"
TRACING_GRACE_S = 2.0  # for the last spans


class RouterProcess:
    """`async with` starts it and stops it; `drain` is what comes before a stop that clients should not notice."""

    def __init__(
        self, config: RouterConfig, model: ServedModel, rng: random.Random, tracing: Tracing | None = None
    ) -> None:
        self.port = 0
        self.metrics = RouterMetrics()
        self.admission = Admission(AdmissionQueue(config.max_in_flight, config.max_waiting, config.refuse_late))
        self.registry = WorkerRegistry(
            config.prefill,
            config.decode,
            max_message_bytes=config.max_message_bytes,
            workers_file=config.workers_file,
            file_interval_s=config.workers_file_interval_s,
            model_digests=model.digests,
            restart_timeout_s=config.restart_timeout_s,
        )
        limits = DispatchLimits(
            moves=MoveLimits(config.max_worker_losses, config.placement_timeout_s, config.migration_timeout_s),
            local_prefill=config.local_prefill,
            first_token=config.first_token,
        )
        self._dispatcher = Dispatcher(self.registry, rng, limits)
        # Twice the limit: what is a little too large is refused by us, naming value and limit; the rest by gRPC.
        self._server = RpcServer(
            config.listen,
            max_message_bytes=2 * config.max_message_bytes,
            max_request_bytes=2 * model.limits.max_message_bytes,
            so_reuseport=config.reuse_port,
            max_connection_age_s=config.max_connection_age_s or None,
        )
        self.servicer = InferenceServicer(
            model,
            self.admission,
            self._dispatcher,
            self.registry,
            self.metrics,
            config.max_timeout_s,
            config.client_stall_timeout_s,
            tracing or Tracing(),
        )
        self.chats = model.chats
        self._server.add(inference_pb2_grpc.add_InferenceServicer_to_server, self.servicer, SERVICE_NAME)
        self.metrics.watch(self._levels)

    def _levels(self) -> Mapping[str, Level]:
        queue, registry = self.admission.queue, self.registry
        return {
            "sequences_in_flight": queue.num_in_flight,
            "requests_waiting": queue.num_waiting,
            "outputs_unread": queue.num_unread,
            "workers_ready": {role.name.lower(): len(registry.candidates(role)) for role in Role},
        }

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Serve while the context is open; on leaving, calls that are still there are cancelled."""
        async with contextlib.aclosing(self.chats), asyncio.TaskGroup() as background:
            tasks = [
                background.create_task(for_good(self.registry.run(), "the list of workers")),
                background.create_task(for_good(self._report_health(), "the health report")),
            ]
            try:
                self.port = await self._server.start()
                background.create_task(self._server.run())
                yield
            finally:
                await self._server.stop(0)
                for task in tasks:
                    task.cancel()

    async def drain(self, grace_s: float) -> None:
        """Refuse new calls and give those under way so much time."""
        await self._server.stop(grace_s)

    async def _report_health(self) -> None:
        was_serving: bool | None = None
        while True:
            serving = self._dispatcher.has_place
            if serving is not was_serving:
                self._server.set_serving(serving)
                _logger.info("serving" if serving else "not serving: no ready workers")
                was_serving = serving
            await self.registry.wait_changed()


def _instance() -> str:
    """Processes behind one port are told apart by their ids."""
    return f"{socket.gethostname()}/{os.getpid()}"


async def run_router(config: RouterConfig) -> None:
    """Serve until SIGTERM or SIGINT, then drain, until another one."""
    model = load_served_model(
        config.served_model_name, config.model, config.max_message_bytes, config.generation_defaults
    )
    signals = StopSignals()
    tracing = open_tracing(config.otlp_endpoint, config.trace_sample_ratio, config.service, _instance())
    router = RouterProcess(config, model, random.Random(secrets.randbits(64)), tracing)
    metrics = MetricsServer(router.metrics, config.metrics_port, config.metrics_address)
    quiet_collector()
    try:
        if config.metrics_port:
            await metrics.start()
        async with router.running(), asyncio.TaskGroup() as beside:
            watching = beside.create_task(watch_loop(config.max_standstill_s))
            beside.create_task(model.chats.start())
            _logger.info("%s on port %d", model.limits.name, router.port)
            await signals.stopping.wait()
            _logger.info("draining for at most %g s", config.drain_timeout_s)
            await signals.unless_hurried(router.drain(config.drain_timeout_s))
            watching.cancel()
    finally:
        await metrics.stop()
        tracing.close(TRACING_GRACE_S)
