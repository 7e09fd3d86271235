"""What is said against a deployment before anything is started, and that the flag to change is named."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cli.deployment_spec import DeploymentSpec
from cli.preflight import check, num_visible_gpus
from common.errors import BatonError, FailedPrecondition
from common.worker.free_port import free_ports


@pytest.fixture
def spec(shipped_model: Path) -> DeploymentSpec:
    return DeploymentSpec(model=shipped_model)


@pytest.fixture
def taken() -> Iterator[int]:
    """A port with another that is above it and taken."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


def said_against(spec: DeploymentSpec, root: Path = Path("/nowhere")) -> str:
    with pytest.raises(BatonError) as refused:
        check(spec, {}, root)
    return str(refused.value)


def test_what_fits_is_let_through(spec: DeploymentSpec) -> None:
    check(spec, {})
    check(replace(spec, num_prefill=0, prefill_tp=3), {})  # of workers that there are none


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": Path("nowhere")}, "--model: nowhere is not a directory"),
        ({"decode_tp": 3}, "--decode-tp = 3: must divide 4 KV heads, or be a multiple"),
        ({"prefill_tp": 16}, "--prefill-tp = 16: must divide the model's 8 attention heads"),
        ({"metrics_port": 65534}, "--metrics-port = 65534: at most 65533"),
        ({"host": "192.0.2.1", "router_port": 1}, "cannot listen on 192.0.2.1:1"),
    ],
)
def test_what_cannot_work_is_said_with_its_flag(changes: dict[str, object], said: str, spec: DeploymentSpec) -> None:
    assert said in said_against(replace(spec, **changes))  # type: ignore[arg-type]


def test_a_directory_without_a_checkpoint_is_named(tmp_path: Path, spec: DeploymentSpec) -> None:
    assert said_against(replace(spec, model=tmp_path)).startswith(f"--model: {tmp_path}")


def test_weights_that_are_drawn_need_no_file(tmp_path: Path, spec: DeploymentSpec) -> None:
    (tmp_path / "config.json").write_bytes((spec.model / "config.json").read_bytes())
    drawn = replace(spec, model=tmp_path, prefill_args=("--random-weights",), decode_args=("--random-weights",))
    check(drawn, {})
    assert "holds neither" in said_against(replace(drawn, decode_args=()))
    # Or so it may be, by what only the workers read.
    check(replace(drawn, decode_args=()), {"BATON_DECODE_RANDOM_WEIGHTS": "true"})
    check(replace(drawn, prefill_args=(), decode_args=("--config=drawn.toml",)), {"BATON_PREFILL_CONFIG": "drawn.toml"})


def test_a_port_that_is_taken_is_said_with_its_flag(taken: int, spec: DeploymentSpec) -> None:
    assert "--port names another" in said_against(replace(spec, router_port=taken))
    second = replace(spec, metrics_port=taken - 1)
    if taken - 1 != spec.router_port:
        assert "--metrics-port names another" in said_against(second)


def test_the_routers_port_is_none_of_the_metrics_ports(spec: DeploymentSpec) -> None:
    (port,) = free_ports(1)
    said = said_against(replace(spec, router_port=port, metrics_port=port - 2))
    assert said.startswith(f"--metrics-port = {port - 2}: 3 processes take ports up to {port}")


def devices_with(tmp_path: Path, *names: str) -> Path:
    (tmp_path / "dev").mkdir(parents=True, exist_ok=True)
    for name in names:
        (tmp_path / "dev" / name).touch()
    return tmp_path


def test_gpus_are_counted_by_their_devices_and_by_what_cuda_may_see(tmp_path: Path) -> None:
    devices = devices_with(tmp_path, "nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm")
    assert num_visible_gpus({}, devices) == 2
    assert num_visible_gpus({"CUDA_VISIBLE_DEVICES": "1"}, devices) == 1
    assert num_visible_gpus({"CUDA_VISIBLE_DEVICES": ""}, devices) == 0
    assert num_visible_gpus({"CUDA_VISIBLE_DEVICES": "-1"}, devices) == 0
    assert num_visible_gpus({}, Path("/nowhere")) is None


def test_gpus_that_nobody_counts_are_left_to_the_ranks(tmp_path: Path, spec: DeploymentSpec) -> None:
    cuda = replace(spec, device="cuda")
    check(cuda, {}, devices_with(tmp_path / "wsl", "dxg"))
    (tmp_path / "elsewhere/proc/driver/nvidia").mkdir(parents=True)
    check(cuda, {}, devices_with(tmp_path / "elsewhere", "null"))


def test_ranks_without_a_gpu_are_refused(tmp_path: Path, spec: DeploymentSpec) -> None:
    cuda = replace(spec, device="cuda", decode_tp=2)
    assert "there is no NVIDIA GPU here" in said_against(cuda, devices_with(tmp_path, "null"))
    devices_with(tmp_path, "nvidia0", "nvidia1")
    assert "3 ranks need a GPU each, and CUDA may use 2 here" in said_against(cuda, tmp_path)
    check(replace(cuda, decode_tp=1), {}, tmp_path)
    check(replace(cuda, decode_args=("--first-device", "0")), {}, tmp_path)  # they share one, as the caller says


def test_a_host_that_is_not_ours_is_no_traceback() -> None:
    with pytest.raises(FailedPrecondition, match=r"192\.0\.2\.1"):
        free_ports(1, "192.0.2.1")
