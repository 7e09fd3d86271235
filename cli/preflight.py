"""What can be said against a deployment before anything of it is started, naming the flag to change.

Looks at ports, at the checkpoint as fronts look at it, and for GPUs. Starts nothing, and reaches no torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from cli.deployment_spec import DeploymentSpec
from common.errors import FailedPrecondition, InvalidArgument, ModelError
from common.worker.free_port import require_free
from common.worker.worker_model import read_worker_model

_MAX_PORT = 65535
_BLOCK_SIZE = 64  # of no matter here: what depends on it is checked by the workers
# WSL and Jetson have GPUs without `nvidia0`; how many, nobody says there.
_UNCOUNTED_GPUS = ("dxg", "nvgpu", "nvhost-gpu")


def check(spec: DeploymentSpec, environ: Mapping[str, str], root: Path = Path("/")) -> None:
    """Raises `InvalidArgument`, `ModelError` or `FailedPrecondition` for the first thing that cannot work."""
    _check_ports(spec)
    _check_model(spec, environ)
    if spec.device == "cuda":
        _check_gpus(spec, num_visible_gpus(environ, root))


def num_visible_gpus(environ: Mapping[str, str], root: Path) -> int | None:
    """GPUs that CUDA would find, by the devices under `root`; None if there may be some and nobody says how many."""
    try:
        names = [entry.name for entry in (root / "dev").iterdir()]
    except OSError:
        return None
    num_gpus = sum(1 for name in names if re.fullmatch(r"nvidia[0-9]+", name))
    listed = environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        wanted = [part for part in listed.split(",") if part.strip()]
        if not wanted or wanted[0].strip() == "-1":
            return 0
        num_gpus = min(num_gpus, len(wanted))
    has_driver = (root / "proc/driver/nvidia").exists()
    if not num_gpus and (has_driver or any(name.startswith(_UNCOUNTED_GPUS) for name in names)):
        return None
    return num_gpus


def _check_ports(spec: DeploymentSpec) -> None:
    _require_free(spec.host, spec.router_port, "the router's port", "--port")
    if not spec.metrics_port:
        return
    num_ports = spec.router_processes + spec.num_prefill + spec.num_decode
    last = spec.metrics_port + num_ports - 1
    if last > _MAX_PORT:
        limit = f"at most {_MAX_PORT - num_ports + 1}: {num_ports} processes take a port each from there on"
        raise InvalidArgument("--metrics-port", spec.metrics_port, limit)
    if spec.metrics_port <= spec.router_port <= last:
        limit = f"{num_ports} processes take ports up to {last}, and {spec.router_port} is the router's (--port)"
        raise InvalidArgument("--metrics-port", spec.metrics_port, limit)
    for port in range(spec.metrics_port, last + 1):
        _require_free(spec.host, port, "a metrics port", "--metrics-port")


def _require_free(host: str, port: int, whose: str, flag: str) -> None:
    try:
        require_free(host, port)
    except FailedPrecondition as error:
        raise FailedPrecondition(f"{whose}: {error}; {flag} names another") from error


def _check_model(spec: DeploymentSpec, environ: Mapping[str, str]) -> None:
    roles = (
        ("prefill", spec.num_prefill, spec.prefill_tp, spec.prefill_args),
        ("decode", spec.num_decode, spec.decode_tp, spec.decode_args),
    )
    for role, num_workers, tp_size, flags in roles:
        if not num_workers:
            continue
        may_draw = _may_draw_weights(role, flags, environ)
        try:
            read_worker_model(spec.model, spec.device, "auto", _BLOCK_SIZE, tp_size, may_draw)
        except ModelError as error:
            raise ModelError(f"--model: {error}") from error
        except InvalidArgument as error:
            if error.field != "tp_size":
                raise
            raise InvalidArgument(f"--{role}-tp", tp_size, error.limit) from error


def _may_draw_weights(role: str, flags: Sequence[str], environ: Mapping[str, str]) -> bool:
    """Whether the workers' settings may say that weights are drawn, so that none need be there. What stands in a file
    or in the environment is theirs to read."""
    if "--random-weights" in flags or any(flag.partition("=")[0] == "--config" for flag in flags):
        return True
    return any(f"BATON_{role}_{name}".upper() in environ for name in ("random_weights", "config"))


def _check_gpus(spec: DeploymentSpec, num_gpus: int | None) -> None:
    if num_gpus is None or any(flag.startswith("--first-device") for flag in (*spec.prefill_args, *spec.decode_args)):
        return  # nobody knows, or the caller deals them out himself
    num_ranks = spec.num_prefill * spec.prefill_tp + spec.num_decode * spec.decode_tp
    if num_gpus == 0:
        raise FailedPrecondition(
            "--device cuda: there is no NVIDIA GPU here that CUDA may use; --device cpu needs none"
        )
    if num_ranks > num_gpus:
        have = f"CUDA may use {num_gpus} here"
        raise FailedPrecondition(f"--device cuda: {num_ranks} ranks need a GPU each, and {have}; ask for fewer workers")
