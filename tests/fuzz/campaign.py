"""A deployment, thousands of inputs for all of its ports, and what must hold meanwhile and afterwards.

In rounds: inputs side by side, then a valid request that must give the right tokens, then the processes are counted.
An input is a function of the seed and its number; a fault names the round in which it was seen.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil  # type: ignore[import-untyped]
from baton.v1 import decode_pb2, decode_pb2_grpc

from cli.client import Client, connect
from cli.deployment import Deployment, DeploymentSpec
from common.errors import BatonError, FailedPrecondition, Unavailable
from common.rpc.client import open_channel
from common.worker.free_port import free_ports, require_free
from tests.faults.settling import settled
from tests.fuzz.messages import Names
from tests.fuzz.sending import Port, Sender
from tests.fuzz.watch import Watch
from tests.integration.reference import Reference
from tests.integration.requests import ask, greedy_request

SIDE_BY_SIDE: Final = 16
VALID_WITHIN_S: Final = 10.0
NUM_TOKENS: Final = 8


@dataclass(slots=True)
class Outcome:
    """What was sent and what did not hold."""

    num_inputs: Counter[str] = field(default_factory=Counter)
    num_valid: int = 0
    faults: list[str] = field(default_factory=list)
    slowest_s: dict[str, float] = field(default_factory=dict)
    megabytes: dict[str, tuple[int, int]] = field(default_factory=dict)  # resident before and after, by process


async def fuzz(
    model: Path,
    inputs: range,
    seed: int,
    per_round: int,
    log_dir: Path | None,
    on_round: Callable[[str], None] = lambda _: None,
) -> Outcome:
    """Send the inputs with these numbers. Stops at the first round with a fault."""
    reference = Reference(model)
    (prompt,) = reference.prompts((70,), seed=5)
    expected = reference.greedy(prompt, NUM_TOKENS)
    outcome = Outcome()
    async with _deployed(model, log_dir) as (deployment, client):
        names = await _names(deployment)
        watch = Watch(deployment, faults=outcome.faults, slowest_s=outcome.slowest_s)
        await _ask_valid(client, prompt, expected, outcome)
        watch.note_processes()
        before = _megabytes(deployment)
        async with Sender(_ports(deployment), names, seed).open() as sender, _running(watch):
            for start in range(inputs.start, inputs.stop, per_round):
                numbers = iter(range(start, min(start + per_round, inputs.stop)))
                await _send(sender, numbers, outcome)
                await _ask_valid(client, prompt, expected, outcome)
                watch.check_processes()
                slowest = max(outcome.slowest_s.values(), default=0.0)
                on_round(f"{outcome.num_inputs.total()} inputs, slowest answer {slowest:.2f} s")
                if outcome.faults:
                    outcome.faults.append(f"in the round of inputs {start} to {start + per_round - 1} of seed {seed}")
                    return outcome
        after = _megabytes(deployment)
        outcome.megabytes = {name: (before[name], after[name]) for name in before}
        try:
            await settled(*deployment.prefill, *deployment.decode)
        except TimeoutError as error:
            outcome.faults.append(f"a worker holds what nobody uses: {error}")
    return outcome


@contextlib.asynccontextmanager
async def _deployed(model: Path, log_dir: Path | None) -> AsyncIterator[tuple[Deployment, Client]]:
    float32 = ("--dtype", "float32")
    spec = DeploymentSpec(
        model=model,
        prefill_args=float32,
        decode_args=float32,
        metrics_port=_three_free_ports(),
        log_dir=log_dir,
        restart=False,
    )
    async with Deployment(spec, on_event=print) as deployment:
        await deployment.ready(90.0)
        async with connect(deployment.router_address) as client:
            yield deployment, client


def _three_free_ports() -> int:
    """The first of three ports in a row that nobody has now: of a router's and two workers' metrics."""
    for port in free_ports(50):
        with contextlib.suppress(FailedPrecondition):
            for number in range(port, port + 3):
                require_free("127.0.0.1", number)
            return port
    raise FailedPrecondition("no three ports in a row are free")


@contextlib.asynccontextmanager
async def _running(watch: Watch) -> AsyncIterator[None]:
    async with asyncio.TaskGroup() as tasks:
        watching = tasks.create_task(watch.run())
        try:
            yield
        finally:
            watching.cancel()


async def _send(sender: Sender, numbers: Iterator[int], outcome: Outcome) -> None:
    async def work() -> None:
        for number in numbers:
            try:
                outcome.num_inputs[await sender.send(number)] += 1
            except TimeoutError:
                outcome.faults.append(f"input {number} did not end")

    async with asyncio.TaskGroup() as tasks:
        for _ in range(SIDE_BY_SIDE):
            tasks.create_task(work())


async def _ask_valid(client: Client, prompt: list[int], expected: list[int], outcome: Outcome) -> None:
    try:
        answer = await ask(client, greedy_request(prompt, NUM_TOKENS), VALID_WITHIN_S)
    except BatonError as error:
        outcome.faults.append(f"a valid request failed: {type(error).__name__}: {error}")
        return
    outcome.num_valid += 1
    if answer.tokens != expected:
        outcome.faults.append(f"a valid request got {answer.tokens} instead of {expected}")


async def _names(deployment: Deployment) -> Names:
    status = await deployment.status(deployment.decode[0])
    async with open_channel(deployment.decode[0].address, 1 << 20) as channel:
        stub: decode_pb2_grpc.DecodeAsyncStub = decode_pb2_grpc.DecodeStub(channel)
        call = stub.Session(iter((decode_pb2.SessionRequest(begin=decode_pb2.SessionBegin(session_id="fuzz")),)))
        async for response in call:
            if response.HasField("tickets"):
                call.cancel()
                return Names(
                    status.worker_id, status.incarnation, status.layout_fingerprint, status.model, response.tickets
                )
    raise Unavailable("decode says no tickets")


def _ports(deployment: Deployment) -> list[Port]:
    """Every port on which a process of the deployment listens, whatever for."""
    ports: list[Port] = []
    for process in deployment.processes:
        grpc_port = int(process.address.rpartition(":")[2])
        front = psutil.Process(process.pid)
        for each in (front, *front.children(recursive=True)):
            for connection in each.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    number = connection.laddr.port
                    speaks = "grpc" if number == grpc_port else "http" if each.pid == front.pid else "other"
                    port = Port(process.role, speaks, number)  # type: ignore[arg-type]
                    if port not in ports:
                        ports.append(port)
    return ports


def _megabytes(deployment: Deployment) -> dict[str, int]:
    return {each.name: psutil.Process(each.pid).memory_info().rss >> 20 for each in deployment.processes}
