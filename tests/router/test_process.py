"""The router as processes: what it loads, how it starts, drains, and is kept alive."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import grpc
import psutil  # type: ignore[import-untyped]
import pytest
from baton.v1 import inference_pb2, inference_pb2_grpc

from common.rpc.client import open_channel
from services.router.config import RouterConfig
from services.router.supervisor import child_argv
from tests.router.byte_checkpoint import write_byte_checkpoint
from tests.router.fake_workers import MAX_MESSAGE_BYTES, FakeDecode, FakePrefill, Script, Tickets, letters

ENVIRONMENT = {**os.environ, "PYTHONPATH": "proto"}
MAX_RSS_BYTES = 250 << 20


def test_the_router_never_loads_torch_nor_transformers() -> None:
    code = (
        "import sys, services.router.__main__, services.router.process\n"
        "print([m for m in ('torch', 'transformers', 'triton', 'numpy', 'ucxx') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_explains_every_setting() -> None:
    command = [sys.executable, "-m", "services.router", "--help"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    shown = " ".join(done.stdout.split())
    for name, field in RouterConfig.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert field.description
        assert " ".join(field.description.split()) in shown


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "--model"),
        (["--model", "/nowhere"], "--prefill"),
        (["--model", "/nowhere", "--prefill", "a:1", "--decode", "b:1"], "/nowhere"),
        (["--model", "/nowhere", "--prefil", "a:1"], "--prefil"),
    ],
)
def test_a_wrong_start_says_what_is_wrong(arguments: list[str], named: str) -> None:
    command = [sys.executable, "-m", "services.router", *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode in (1, 2)
    assert named in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_port_that_is_taken_is_named(num_processes: int, tmp_path: Path) -> None:
    """Several processes share their port with each other, and with nobody else."""
    with socket.socket() as taken:
        if num_processes > 1:
            taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        arguments = ["--listen", address, "--model", str(write_byte_checkpoint(tmp_path)), "--decode", "127.0.0.1:1"]
        arguments += ["--processes", str(num_processes)]
        command = [sys.executable, "-m", "services.router", *arguments]
        done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert f"baton router: cannot listen on {address}" in done.stderr
    assert "Traceback" not in done.stderr


def test_children_share_the_port_and_have_metrics_ports_of_their_own() -> None:
    values = {"model": "m", "prefill": ("a:1",), "processes": 2, "metrics_port": 9000}
    config = RouterConfig.model_validate(values)
    assert child_argv(["--a", "b"], config, 1) == [
        "--a", "b", "--processes", "1", "--reuse-port", "--metrics-port", "9001",
    ]  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def ask(stub: inference_pb2_grpc.InferenceAsyncStub, num_tokens: int) -> list[int]:
    """One request; sent again while processes start."""
    request = inference_pb2.GenerateRequest(text="hi")
    request.sampling.max_tokens = num_tokens
    token_ids: list[int] = []
    async for response in stub.Generate(request, wait_for_ready=True, timeout=60):
        token_ids += response.token_ids
    return token_ids


@pytest.mark.slow
async def test_a_supervised_router_serves_survives_kills_and_a_stopped_process_and_drains(tmp_path: Path) -> None:
    script = Script()
    tickets = Tickets()
    prefill, decode = FakePrefill("p", script, tickets), FakeDecode("d", script, tickets)
    await prefill.start()
    await decode.start()
    address = f"127.0.0.1:{free_port()}"
    arguments = ["--listen", address, "--model", str(write_byte_checkpoint(tmp_path)), "--processes", "2"]
    arguments += ["--prefill", prefill.address, "--decode", decode.address, "--drain-timeout-s", "5"]
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "services.router", *arguments, env=ENVIRONMENT, stderr=asyncio.subprocess.DEVNULL
    )
    channel = open_channel(address, MAX_MESSAGE_BYTES)
    stub: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(channel)
    try:
        assert await ask(stub, 5) == letters(0, 5)
        children = psutil.Process(parent.pid).children()
        assert len(children) == 2
        assert all(child.memory_info().rss < MAX_RSS_BYTES for child in children)
        for child in children:
            child.kill()
        while True:
            try:
                assert await ask(stub, 5) == letters(0, 5)
                break
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:  # the connection that was killed
                    raise
        (stopped, *_) = psutil.Process(parent.pid).children()
        stopped.suspend()  # the kernel goes on giving it connections
        await asyncio.to_thread(stopped.wait, 15)
        assert await ask(stub, 5) == letters(0, 5)
        prefill.entered.clear()
        script.before_decode.clear()
        running = asyncio.create_task(ask(stub, 5))
        await asyncio.wait_for(prefill.entered.wait(), 60)
        parent.send_signal(signal.SIGTERM)
        script.before_decode.set()
        assert await running == letters(0, 5)
        assert await asyncio.wait_for(parent.wait(), 60) == 0
        assert not any(child.is_running() for child in children)
    finally:
        if parent.returncode is None:
            parent.terminate()
            await parent.wait()
        await channel.close()
        await prefill.die()
        await decode.die()
