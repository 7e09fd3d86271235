"""The whole path on GPUs: router, prefill and decode workers as processes of their own, over real UCX.

    python -m benchmarks.gpu_path [--device cuda] [--shape llama-3.1-8b]

First the shipped checkpoint in float32: greedy tokens must equal those of a deployment on the CPU, for every pairing of
rank counts that the GPUs allow. Then a model of random weights: time to the first token of a prompt against the time
that prefill took for it, how long the hand-off keeps the second token waiting, and the gaps between tokens while
prompts arrive. Without GPUs all of it runs on the CPU with the shipped checkpoint, as a rehearsal.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.goodput import GPU_ARGS, SHIPPED, write_model
from cli.client import Client, connect
from cli.deployment import Deployment, DeploymentSpec
from loadtest.arrivals import Arrivals
from loadtest.generator import LoadTest, Observed, describe_target, run_load_test
from loadtest.lengths import Fixed
from loadtest.measured import measured_part
from loadtest.sizes import RandomSizes
from loadtest.statistics import summarize
from loadtest.targets.base import TargetSpec
from loadtest.workload import Workload
from tests.integration.requests import ask, greedy_request

FLOAT32 = ("--dtype", "float32")
CHECK_LENGTHS = (1, 63, 64, 65, 500, 2000)
NUM_TOKENS = 24
READY_TIMEOUT_S = 240.0
PAIRINGS = ((1, 1), (1, 2), (2, 1), (2, 2))  # prefill and decode ranks


@dataclass(frozen=True, slots=True)
class Timing:
    """One request, as its client and its server saw it."""

    ttft_s: float
    prefill_s: float
    exposed_s: float  # of the hand-off: first token sampled to hand-off complete, in the prefill worker
    second_gap_s: float  # first token to second
    step_s: float  # median of the gaps after that
    transport: str


@asynccontextmanager
async def deployed(spec: DeploymentSpec) -> AsyncIterator[tuple[Deployment, Client]]:
    async with Deployment(spec, on_event=lambda event: print(event, file=sys.stderr)) as deployment:
        await deployment.ready(READY_TIMEOUT_S)
        async with connect(deployment.router_address) as client:
            yield deployment, client


def random_prompt(num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    generator = np.random.default_rng(seed)
    drawn: list[int] = generator.integers(3, vocab_size, num_tokens).tolist()
    return drawn


async def tokens_of(device: str, prefill_tp: int, decode_tp: int, log_dir: Path) -> tuple[list[list[int]], str]:
    """Greedy outputs of the shipped checkpoint, alone and all at once, and what carried the blocks."""
    spec = DeploymentSpec(
        model=SHIPPED, device=device, prefill_tp=prefill_tp, decode_tp=decode_tp,
        prefill_args=FLOAT32, decode_args=FLOAT32, log_dir=log_dir,
    )  # fmt: skip
    async with deployed(spec) as (_, client):
        vocab_size = (await client.model_info()).vocab_size
        prompts = [random_prompt(length, vocab_size, seed) for seed, length in enumerate(CHECK_LENGTHS)]
        alone = [await ask(client, greedy_request(prompt, NUM_TOKENS)) for prompt in prompts]
        again = await asyncio.gather(*(ask(client, greedy_request(prompt, NUM_TOKENS)) for prompt in prompts))
    assert [answer.tokens for answer in again] == [answer.tokens for answer in alone], "together differs from alone"
    return [answer.tokens for answer in alone], alone[-1].lifetime.transport


async def check(device: str, num_devices: int, log_dir: Path) -> None:
    """Raises unless every pairing gives the tokens of the CPU."""
    expected, _ = await tokens_of("cpu", 1, 1, log_dir / "cpu")
    for prefill_tp, decode_tp in PAIRINGS:
        if prefill_tp + decode_tp > num_devices:
            continue
        got, transport = await tokens_of(device, prefill_tp, decode_tp, log_dir / f"{prefill_tp}-{decode_tp}")
        assert got == expected, f"prefill TP {prefill_tp}, decode TP {decode_tp}: other tokens than on the CPU"
        print(f"checked: prefill TP {prefill_tp} -> decode TP {decode_tp} over {transport} equals the CPU", flush=True)


async def time_one(client: Client, prompt: Sequence[int]) -> Timing:
    """One request with nothing else under way."""
    request = greedy_request(list(prompt), NUM_TOKENS)
    start_s = time.perf_counter()
    arrivals: list[float] = []
    async for response in client.generate(request, 120.0):
        arrivals += [time.perf_counter()] * bool(response.token_ids)
        if response.HasField("lifetime"):
            lifetime = response.lifetime
    gaps_s = [after - before for before, after in itertools.pairwise(arrivals)]
    return Timing(
        arrivals[0] - start_s,
        lifetime.prefill_ns * 1e-9,
        lifetime.exposed_handoff_ns * 1e-9,
        gaps_s[0],
        statistics.median(gaps_s[1:]),
        lifetime.transport,
    )


async def time_prompts(client: Client, num_tokens: int, repeats: int) -> None:
    """Prints what one prompt of a length costs, prompts of its own each time."""
    vocab_size = (await client.model_info()).vocab_size
    timings = [
        await time_one(client, random_prompt(num_tokens, vocab_size, 1000 * num_tokens + index))
        for index in range(repeats + 2)
    ][2:]
    beyond_ms = [(t.ttft_s - t.prefill_s) * 1e3 for t in timings]
    late_ms = [(t.second_gap_s - t.step_s) * 1e3 for t in timings]
    exposed_ms = [t.exposed_s * 1e3 for t in timings]
    prefill_ms = [t.prefill_s * 1e3 for t in timings]
    print(
        f"{num_tokens} tokens over {timings[0].transport}: prefill p50 {_p50(prefill_ms)} ms, "
        f"TTFT beyond it p50 {_p50(beyond_ms)} ms; hand-off exposed p50 {_p50(exposed_ms)} ms, max "
        f"{max(exposed_ms):.2f} ms; second token late by p50 {_p50(late_ms)} ms, max {max(late_ms):.2f} ms; step p50 "
        f"{_p50([t.step_s * 1e3 for t in timings])} ms",
        flush=True,
    )


async def time_load(address: str, rate: float, num_requests: int, sizes: tuple[int, int]) -> None:
    """Prints the gaps between tokens while prompts arrive."""
    target = TargetSpec("baton", address)
    model = await describe_target(target)
    lengths = RandomSizes(Fixed(sizes[0]), Fixed(sizes[1]))
    workload = Workload(Arrivals(rate), lengths, seed=1, num_requests=num_requests)
    run = await run_load_test(LoadTest(target, model, workload, num_warmup=4), asyncio.Event(), Observed())
    summary = summarize(measured_part(run))
    assert summary.gap is not None
    assert summary.ttft is not None
    print(
        f"{rate:g} requests/s of {sizes[0]} + {sizes[1]} tokens: gaps p50 {summary.gap.p50_s * 1e3:.2f} ms, p99 "
        f"{summary.gap.p99_s * 1e3:.2f} ms, max {summary.gap.max_s * 1e3:.2f} ms; TTFT p50 "
        f"{summary.ttft.p50_s * 1e3:.1f} ms; {summary.num_failed} failed",
        *summary.warnings,
        flush=True,
    )


def _p50(values: list[float]) -> str:
    return f"{statistics.median(values):.2f}"


async def measure(args: argparse.Namespace, log_dir: Path) -> None:
    on_gpu = args.device == "cuda"
    await check(args.device, args.devices, log_dir)
    model = write_model(args.shape, log_dir) if on_gpu else SHIPPED
    common = (*GPU_ARGS, "--kv-bytes", str(args.kv_bytes)) if on_gpu else FLOAT32
    spec = DeploymentSpec(
        model=model, device=args.device, prefill_args=common, decode_args=common, log_dir=log_dir / "path"
    )
    async with deployed(spec) as (deployment, client):
        for num_tokens in args.prompts:
            await time_prompts(client, num_tokens, args.repeats)
        for rate in args.rates:
            await time_load(deployment.router_address, rate, args.requests, (args.prompts[0], args.output_tokens))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where ranks compute (cpu)")
    add("--devices", type=int, default=2, help="how many there are (2)")
    add("--shape", default="llama-3.1-8b", help="of the random weights, on GPUs (llama-3.1-8b)")
    add("--kv-bytes", type=int, default=40 << 30, help="KV memory of each worker on a GPU (40 GiB)")
    add("--prompts", type=int, nargs="+", default=[2048, 8192], help="prompt lengths, tokens (2048 8192)")
    add("--repeats", type=int, default=20, help="requests of each length (20)")
    add("--rates", type=float, nargs="+", default=[4.0, 10.0], help="requests/s while gaps are measured (4 10)")
    add("--requests", type=int, default=200, help="requests at each rate (200)")
    add("--output-tokens", type=int, default=200, help="tokens of each answer under load (200)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(measure(args, Path(directory)))


if __name__ == "__main__":
    main()
