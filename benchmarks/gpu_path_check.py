"""Whether a deployment's answers are right, whichever ranks and workers its devices are divided into.

With the shipped checkpoint in float32: greedy tokens equal those of a deployment on the CPU. With a model that has no
reference: each prompt alone, all prompts at once, and all at once without a hand-off (a second router, for which the
same decode workers compute prompts themselves) give outputs that differ only where rounding decides. Each of them is a
tenant of its own, so that none finds blocks of another in a prefix cache. What follows a prompt does not depend on the
order of its full blocks, as attention sums over them; so prompts are also cut, to see that the blocks that a hand-off
left in the prefix cache are where they belong. Used by `benchmarks.gpu_path`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from baton.v1 import inference_pb2

from benchmarks.goodput import SHIPPED
from benchmarks.output_comparison import Comparison, Output, compare
from cli.client import Client, connect
from cli.deployment import Deployment, DeploymentSpec
from common.errors import BatonError
from common.parent_death import environment_of_child
from common.worker.free_port import free_ports
from tests.integration.requests import Answer, ask, greedy_request

FLOAT32 = ("--dtype", "float32")
CHECK_LENGTHS = (1, 63, 64, 65, 500, 2000)
ROUNDING_LENGTHS = (100, 127, 128, 129, 200, 255, 320, 450, 512, 640, 777, 1000, 1024, 1500, 1990, 2000)
BLOCK_SIZE = 64  # tokens
NUM_TOKENS = 24
NUM_LOGPROBS = 20  # the most that can be asked for
READY_TIMEOUT_S = 240.0
ANSWER_TIMEOUT_S = 120.0  # the first steps of a shape compile kernels
STOP_S = 5.0


@dataclass(frozen=True, slots=True)
class Topology:
    """How many workers there are, and of how many ranks. Each rank has a device of its own."""

    num_prefill: int = 1
    prefill_tp: int = 1
    num_decode: int = 1
    decode_tp: int = 1
    capture_tokens: int = 512  # of prefill workers on GPUs

    @property
    def num_devices(self) -> int:
        return self.num_prefill * self.prefill_tp + self.num_decode * self.decode_tp

    def __str__(self) -> str:
        return f"prefill {self.num_prefill} x TP {self.prefill_tp} -> decode {self.num_decode} x TP {self.decode_tp}"

    def spec(self, model: Path, device: str, worker_args: tuple[str, ...], log_dir: Path) -> DeploymentSpec:
        prefill_args = (*worker_args, "--capture-tokens", str(self.capture_tokens))
        return DeploymentSpec(
            model=model, device=device, prefill_args=prefill_args, decode_args=worker_args, log_dir=log_dir,
            num_prefill=self.num_prefill, prefill_tp=self.prefill_tp,
            num_decode=self.num_decode, decode_tp=self.decode_tp,
        )  # fmt: skip


PAIRINGS = tuple(Topology(prefill_tp=p, decode_tp=d) for p, d in ((1, 1), (1, 2), (2, 1), (2, 2)))


@asynccontextmanager
async def deployed(spec: DeploymentSpec) -> AsyncIterator[tuple[Deployment, Client]]:
    async with Deployment(spec, on_event=lambda event: print(event, file=sys.stderr)) as deployment:
        await deployment.ready(READY_TIMEOUT_S)
        async with connect(deployment.router_address) as client:
            yield deployment, client


@asynccontextmanager
async def local_router(deployment: Deployment, model: Path, log_dir: Path) -> AsyncIterator[Client]:
    """A router of its own for the same decode workers, which compute its prompts themselves. `log_dir` exists."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    flags = ["--listen", address, "--model", str(model), "--local-prefill", "always"]
    flags += ["--decode", ",".join(worker.address for worker in deployment.decode)]
    with (log_dir / "local-router.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "services.router", *flags,
            stdin=asyncio.subprocess.DEVNULL, stdout=log, stderr=log, env=environment_of_child(),
        )  # fmt: skip
        try:
            async with connect(address) as client:
                await _serving(client, process)
                yield client
        finally:
            if process.returncode is None:
                process.terminate()
            try:
                await asyncio.wait_for(process.wait(), STOP_S)
            except TimeoutError:
                process.kill()
                await process.wait()


async def _serving(client: Client, process: asyncio.subprocess.Process) -> None:
    """Raises `TimeoutError`, or `RuntimeError` when the process has ended."""
    async with asyncio.timeout(READY_TIMEOUT_S):
        while process.returncode is None:
            try:
                if (await client.model_info()).is_serving:
                    return
            except BatonError:
                pass  # it does not listen yet
            await asyncio.sleep(0.05)  # start-up only: the model info has no stream to wait on
    raise RuntimeError(f"the second router ended with status {process.returncode}")


def random_prompt(num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    generator = np.random.default_rng(seed)
    drawn: list[int] = generator.integers(3, vocab_size, num_tokens).tolist()
    return drawn


def _request(prompt: list[int], tenant: str) -> inference_pb2.GenerateRequest:
    request = greedy_request(prompt, NUM_TOKENS, NUM_LOGPROBS)
    request.tenant = tenant
    return request


def _cut(length: int) -> int:
    return length // BLOCK_SIZE // 2 * BLOCK_SIZE + BLOCK_SIZE // 2


async def answers_of(
    client: Client, lengths: Sequence[int], tenant: str, at_once: bool, cut: bool = False
) -> list[Answer]:
    """One answer for each length of prompts; nothing comes from a prefix cache that another tenant filled.

    `cut`: only half of the prompt's full blocks are asked for, and half a block more, of prompts of two blocks or more.
    """
    vocab_size = (await client.model_info()).vocab_size
    requests = [
        _request(random_prompt(length, vocab_size, seed)[: _cut(length) if cut else length], tenant)
        for seed, length in enumerate(lengths)
        if not cut or length >= 2 * BLOCK_SIZE
    ]
    if at_once:
        return await asyncio.gather(*(ask(client, request, ANSWER_TIMEOUT_S) for request in requests))
    return [await ask(client, request, ANSWER_TIMEOUT_S) for request in requests]


def assert_handed_off(answers: Sequence[Answer], deployment: Deployment) -> None:
    """Raises unless all prompts were computed by prefill workers and shipped whole, and every worker did its part."""
    lifetimes = [answer.lifetime for answer in answers]
    assert all(one.num_blocks_shipped and not one.num_blocks_reused for one in lifetimes), "not all blocks were shipped"
    assert not any(one.num_migrations for one in lifetimes), "a sequence was moved"
    used = {one.prefill_worker for one in lifetimes} | {one.decode_worker for one in lifetimes}
    unused = {worker.name for worker in (*deployment.prefill, *deployment.decode)} - used
    assert not unused, f"no request was given to {', '.join(sorted(unused))}"


async def tokens_of(device: str, topology: Topology, log_dir: Path) -> tuple[list[list[int]], str]:
    """Greedy outputs of the shipped checkpoint, alone and all at once, and what carried the blocks."""
    async with deployed(topology.spec(SHIPPED, device, FLOAT32, log_dir)) as (deployment, client):
        alone = await answers_of(client, CHECK_LENGTHS, "alone", at_once=False)
        again = await answers_of(client, CHECK_LENGTHS, "together", at_once=True)
        assert_handed_off([*alone, *again], deployment)
    assert [answer.tokens for answer in again] == [answer.tokens for answer in alone], "together differs from alone"
    return [answer.tokens for answer in alone], alone[-1].lifetime.transport


async def check(device: str, topologies: Sequence[Topology], log_dir: Path) -> None:
    """Raises unless every topology gives the tokens of the CPU."""
    async with asyncio.TaskGroup() as tasks:
        reference = tasks.create_task(tokens_of("cpu", Topology(), log_dir / "cpu"))
        for index, topology in enumerate(topologies):
            got, transport = await tokens_of(device, topology, log_dir / f"check-{index}")
            expected, _ = await reference
            assert got == expected, f"{topology}: other tokens than on the CPU"
            print(f"checked: {topology} over {transport}: as the CPU", flush=True)


def output_of(answer: Answer) -> Output:
    logprobs = [{one.token_id: one.logprob for one in (*position.top, position.chosen)} for position in answer.logprobs]
    return Output(answer.tokens, logprobs)


async def check_rounding(
    deployment: Deployment, client: Client, model: Path, log_dir: Path, tolerance: float
) -> dict[str, Comparison]:
    """Raises unless the deployment's own outputs differ from each other only where rounding decides."""
    alone = await answers_of(client, ROUNDING_LENGTHS, "alone", at_once=False)
    together = await answers_of(client, ROUNDING_LENGTHS, "together", at_once=True)
    assert_handed_off([*alone, *together], deployment)
    reused = await answers_of(client, ROUNDING_LENGTHS, "alone", at_once=False, cut=True)
    assert all(answer.lifetime.num_blocks_reused for answer in reused), "no blocks of the hand-off before were reused"
    async with local_router(deployment, model, log_dir) as colocated:
        local = await answers_of(colocated, ROUNDING_LENGTHS, "local", at_once=True)
        local_cut = await answers_of(colocated, ROUNDING_LENGTHS, "local cut", at_once=True, cut=True)
    without = [answer.lifetime for answer in (*local, *local_cut)]
    assert not any(one.num_blocks_shipped or one.num_cached_tokens for one in without), (
        "a prompt was not computed whole"
    )
    pairs = {
        "alone and all at once": (alone, together),
        "with and without a hand-off": (alone, local),
        "reused blocks of a hand-off and none": (reused, local_cut),
    }
    found = {
        name: compare([output_of(a) for a in own], [output_of(a) for a in other], tolerance)
        for name, (own, other) in pairs.items()
    }
    for name, comparison in found.items():
        print(f"checked: {name}: {comparison}", flush=True)
    faults = [f"{name}: {fault}" for name, comparison in found.items() for fault in comparison.faults]
    assert not faults, "more than rounding: " + "; ".join(faults)
    return found


def figures_of(found: dict[str, Comparison]) -> dict[str, object]:
    """For JSON."""
    return {name: dataclasses.asdict(comparison) for name, comparison in found.items()}
