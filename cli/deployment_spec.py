"""What a deployment on this machine consists of, as a value. Knows no process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class DeploymentSpec:
    """What to start. `*_args` are further flags of that service, as `python -m services.X --help` shows them."""

    model: Path
    num_prefill: int = 1
    num_decode: int = 1
    prefill_tp: int = 1
    decode_tp: int = 1
    router_processes: int = 1
    metrics_port: int = 0  # of the first router process; the others follow, then the workers. 0: no metrics
    device: str = "cpu"  # or `cuda`: every rank gets a GPU of its own, prefill workers first
    host: str = "127.0.0.1"  # where all of it listens
    router_port: int = 0
    prefill_args: tuple[str, ...] = ()
    decode_args: tuple[str, ...] = ()
    router_args: tuple[str, ...] = ()
    log_dir: Path | None = None
    restart: bool = True
