"""The router's settings. Defaults are those of a single machine; every field explains itself in `--help`."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import Field, model_validator

from common.config import Address, ServiceConfig, split_address
from common.loop_watchdog import MAX_STANDSTILL_S
from common.telemetry.tracing import OTLP_ENDPOINT_HELP, TRACE_SAMPLE_RATIO_HELP
from services.router.generation_config import DefaultsSource
from services.router.placement import LocalPrefill
from services.router.sequence_receiver import FirstToken


class RouterConfig(ServiceConfig):
    """The router: takes requests from clients and runs each through a prefill and a decode worker."""

    service: ClassVar[str] = "router"

    listen: Address = Field("127.0.0.1:50051", description="host:port for clients.")
    model: Path = Field(
        description="Checkpoint directory: tokenizer and config.json; weights only tell its workers from others."
    )
    model_name: str = Field("", description="Name that requests may give; the directory's name if empty.")
    generation_defaults: DefaultsSource = Field(
        DefaultsSource.CHECKPOINT,
        description=(
            "Sampling where a request leaves it open: checkpoint (its generation_config.json; refused if it asks for "
            "what Baton cannot do), none (temperature 1, nothing cut off, no penalty, whatever that file says)."
        ),
    )
    prefill: tuple[Address, ...] = Field((), description="host:port of each prefill worker.")
    decode: tuple[Address, ...] = Field((), description="host:port of each decode worker.")
    workers_file: Path | None = Field(
        None, description="TOML file with lists `prefill` and `decode` of more workers; read again when it changes."
    )
    workers_file_interval_s: float = Field(1.0, gt=0, description="Time between looks at that file, seconds.")
    max_in_flight: int = Field(512, ge=16, description="Sequences under way at once (a request with n has n).")
    max_waiting: int = Field(1024, ge=0, description="Requests that may wait for a place; more are refused.")
    refuse_late: bool = Field(
        True, description="Refuse a request at once if it would wait, by estimate, for longer than its deadline leaves."
    )
    max_timeout_s: float = Field(600.0, gt=0, description="Longest deadline of a request, and the default, seconds.")
    max_connection_age_s: float = Field(
        10.0, ge=0, description="When clients are asked to connect anew, seconds; 0 is never. See drain_timeout_s."
    )
    client_stall_timeout_s: float = Field(
        10.0, gt=0, description="Time for a client to make room for the next message; then its request ends, seconds."
    )
    max_message_bytes: int = Field(16 << 20, ge=1 << 16, description="Largest gRPC message, bytes.")
    max_worker_losses: int = Field(3, ge=0, description="Deaths and failures of workers that one sequence survives.")
    placement_timeout_s: float = Field(
        5.0, ge=0, description="Wait of a new request for a ready pair while no worker starts, seconds."
    )
    migration_timeout_s: float = Field(
        60.0, ge=0, description="Wait of a moving sequence for a ready pair while no worker starts, seconds."
    )
    restart_timeout_s: float = Field(
        60.0, ge=0, description="Time for which a worker that was ready and is gone counts as starting, seconds."
    )
    local_prefill: LocalPrefill = Field(
        LocalPrefill.NEVER,
        description="When decode workers compute prompts themselves: never, when-empty (no prefill worker), always.",
    )
    first_token: FirstToken = Field(
        FirstToken.EAGER,
        description="Release of the first token: eager (at once), steady (when the first decode step is under way).",
    )
    max_standstill_s: float = Field(
        MAX_STANDSTILL_S, ge=0, description="Standstill of the event loop after which the process ends; 0 is never."
    )
    metrics_port: int = Field(0, ge=0, le=65535, description="Prometheus port; the i-th process adds i. 0 is off.")
    metrics_host: str = Field("", description="Where it is served; the host of listen if empty.")
    otlp_endpoint: str = Field("", description=OTLP_ENDPOINT_HELP)
    trace_sample_ratio: float = Field(1.0, ge=0, le=1, description=TRACE_SAMPLE_RATIO_HELP)
    processes: int = Field(1, ge=1, le=64, description="Processes that share the port (SO_REUSEPORT).")
    reuse_port: bool = Field(False, description="Share the port with other processes; implied by --processes.")
    drain_timeout_s: float = Field(
        30.0,
        ge=0,
        description="Time for requests under way after SIGTERM, seconds. For the age of connections, and at most half "
        "of it, new ones are taken on standing connections, so that clients can go elsewhere without losing any.",
    )
    log_level: str = Field("INFO", pattern="^(DEBUG|INFO|WARNING|ERROR)$", description="Lowest level that is logged.")

    @property
    def served_model_name(self) -> str:
        """The name that GetModelInfo reports."""
        return self.model_name or self.model.resolve().name

    @property
    def metrics_address(self) -> str:
        """`metrics_host`, or what it is by default."""
        return self.metrics_host or split_address(self.listen)[0]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not (self.prefill or self.decode or self.workers_file):
            raise ValueError("no workers: set --prefill and --decode, or --workers-file")
        if self.processes > 1 and self.listen.endswith(":0"):
            raise ValueError("processes cannot share a port that the kernel chooses: name one in --listen")
        return self
