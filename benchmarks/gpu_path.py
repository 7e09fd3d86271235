"""The whole path on GPUs: router, prefill and decode workers as processes of their own, over real UCX.

    python -m benchmarks.gpu_path [--device cuda] [--shape llama-3.1-8b] [--prefill-workers 2 --decode-tp 2 --devices 4]

First the shipped checkpoint in float32: greedy tokens must equal those of a deployment on the CPU, for the workers and
ranks asked for, or without such flags for every pairing of rank counts that the GPUs allow. Then a model of random
weights: its outputs with and without a hand-off may differ only where rounding decides; then the time to the first
token against the time that prefill took for it, how long the hand-off keeps the second token waiting, and the gaps
between tokens while prompts arrive. Without GPUs all of it runs on the CPU with the shipped checkpoint, as a rehearsal.
Prompts are repeated until there are enough for a p99 or `--limit` is near: how many there were is printed.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.goodput import GPU_ARGS, SHIPPED, write_model
from benchmarks.gpu_path_check import (
    FLOAT32,
    PAIRINGS,
    Topology,
    check,
    check_rounding,
    deployed,
    figures_of,
    random_prompt,
)
from benchmarks.output_comparison import TOLERANCE
from benchmarks.step_times import percentile
from cli.client import Client
from loadtest.arrivals import Arrivals
from loadtest.generator import LoadTest, Observed, describe_target, run_load_test
from loadtest.lengths import Fixed
from loadtest.measured import measured_part
from loadtest.sizes import RandomSizes
from loadtest.statistics import summarize
from loadtest.targets.base import TargetSpec
from loadtest.workload import Workload
from tests.integration.requests import greedy_request

NUM_TIMED_TOKENS = 8  # of a request whose hand-off is timed: four gaps or more say how long a step takes
NUM_WARM_UPS = 2
MIN_REPEATS = 5
P99_FROM = 100  # values: of fewer, the p99 would be the largest
STOP_S = 5.0  # for load that ends after its last arrival, and for the processes


@dataclass(frozen=True, slots=True)
class Timing:
    """One request, as its client and its server saw it."""

    ttft_s: float
    prefill_s: float
    exposed_s: float  # of the hand-off: first token sampled to hand-off complete, in the prefill worker
    second_gap_s: float  # first token to second
    step_s: float  # median of the gaps after that
    transport: str


async def time_one(client: Client, prompt: Sequence[int]) -> Timing:
    """One request with nothing else under way."""
    request = greedy_request(list(prompt), NUM_TIMED_TOKENS)
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


async def time_prompts(
    client: Client, lengths: Sequence[int], repeats: int, until_s: float
) -> dict[int, dict[str, float]]:
    """Prints what one prompt of each length costs, prompts of its own each time, the lengths by turns.

    Begins none after `until_s` (of `time.monotonic`) unless there are fewer than `MIN_REPEATS`.
    """
    vocab_size = (await client.model_info()).vocab_size
    timings: dict[int, list[Timing]] = {length: [] for length in lengths}
    for index in range(repeats + NUM_WARM_UPS):
        if index >= MIN_REPEATS + NUM_WARM_UPS and time.monotonic() > until_s:
            break
        for length, own in timings.items():
            own.append(await time_one(client, random_prompt(length, vocab_size, 1000 * length + index)))
    found = {length: figures(own[NUM_WARM_UPS:]) for length, own in timings.items()}
    print_figures(found, timings[lengths[0]][-1].transport, len(timings[lengths[0]]) - NUM_WARM_UPS)
    return found


def figures(timings: Sequence[Timing]) -> dict[str, float]:
    """Milliseconds: p50, and of what the hand-off adds p99 (if there are enough) and the largest."""
    values = {
        "prefill": [t.prefill_s for t in timings],
        "TTFT beyond it": [t.ttft_s - t.prefill_s for t in timings],
        "hand-off exposed": [t.exposed_s for t in timings],
        "second token late by": [t.second_gap_s - t.step_s for t in timings],
        "step": [t.step_s for t in timings],
    }
    found = {f"{name} p50": statistics.median(seconds) * 1e3 for name, seconds in values.items()}
    for name in ("hand-off exposed", "second token late by"):
        if len(timings) >= P99_FROM:
            found[f"{name} p99"] = percentile(values[name], 0.99) * 1e3
        found[f"{name} max"] = max(values[name]) * 1e3
    return found


def print_figures(found: dict[int, dict[str, float]], transport: str, num_requests: int) -> None:
    """A table with a column for each length of prompts."""
    print(f"{num_requests} requests of each length, one at a time, over {transport}; ms")
    print(f"| | {' | '.join(f'{length} tokens' for length in found)} |\n|{'---|' * (len(found) + 1)}")
    for name in next(iter(found.values())):
        print(f"| {name} | {' | '.join(f'{own[name]:.2f}' for own in found.values())} |", flush=True)


async def time_load(address: str, rate: float, num_requests: int, sizes: tuple[int, int]) -> dict[str, float]:
    """Prints the gaps between tokens while prompts arrive; milliseconds."""
    target = TargetSpec("baton", address)
    model = await describe_target(target)
    lengths = RandomSizes(Fixed(sizes[0]), Fixed(sizes[1]))
    workload = Workload(Arrivals(rate), lengths, seed=1, num_requests=num_requests)
    run = await run_load_test(LoadTest(target, model, workload, num_warmup=4), asyncio.Event(), Observed())
    summary = summarize(measured_part(run))
    assert summary.gap is not None
    assert summary.ttft is not None
    gap, ttft = summary.gap, summary.ttft
    found = {"gap p50": gap.p50_s * 1e3, "gap p99": gap.p99_s * 1e3, "gap max": gap.max_s * 1e3}
    found["TTFT p50"] = ttft.p50_s * 1e3
    print(
        f"{rate:g} requests/s of {sizes[0]} + {sizes[1]} tokens, {num_requests} requests: "
        f"{', '.join(f'{name} {ms:.2f} ms' for name, ms in found.items())}; {summary.num_failed} failed",
        *summary.warnings,
        flush=True,
    )
    return found | {"failed": summary.num_failed}


def topology_of(args: argparse.Namespace) -> Topology:
    return Topology(args.prefill_workers, args.prefill_tp, args.decode_workers, args.decode_tp, args.capture_tokens)


def topologies_to_check(topology: Topology, num_devices: int) -> list[Topology]:
    """The one that was asked for; if that is the default, every pairing of rank counts that the devices allow."""
    if topology != Topology():
        return [topology]
    return [pairing for pairing in PAIRINGS if pairing.num_devices <= num_devices]


async def measure(args: argparse.Namespace, log_dir: Path) -> None:
    begun_s = time.monotonic()
    on_gpu = args.device == "cuda"
    topology = topology_of(args)
    if not args.skip_check:
        await check(args.device, topologies_to_check(topology, args.devices), log_dir)
    model = write_model(args.shape, log_dir) if on_gpu else SHIPPED
    common = (*GPU_ARGS, "--kv-bytes", str(args.kv_bytes)) if on_gpu else FLOAT32
    spec = topology.spec(model, args.device, common, log_dir / "path")
    load_s = args.load_seconds * len(args.rates)
    until_s = begun_s + args.limit - load_s - STOP_S
    results: dict[str, object] = {"device": args.device, "shape": args.shape if on_gpu else SHIPPED.name}
    results["topology"] = dataclasses.asdict(topology)
    async with deployed(spec) as (deployment, client):
        print(f"{topology}: ready after {time.monotonic() - begun_s:.0f} s", flush=True)
        if not args.skip_rounding:
            found = await check_rounding(deployment, client, model, log_dir / "path", args.tolerance)
            results["rounding"] = figures_of(found)
        results["prompts"] = await time_prompts(client, args.prompts, args.repeats, until_s)
        results["load"] = {
            rate: await time_load(
                deployment.router_address,
                rate,
                max(2, round(rate * args.load_seconds)),
                (args.prompts[0], args.output_tokens),
            )
            for rate in args.rates
        }
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))
    print(f"done after {time.monotonic() - begun_s:.0f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where ranks compute (cpu)")
    add("--devices", type=int, default=2, help="how many there are (2)")
    add("--prefill-workers", type=int, default=1, help="prefill workers (1)")
    add("--prefill-tp", type=int, default=1, help="ranks of each (1)")
    add("--decode-workers", type=int, default=1, help="decode workers (1)")
    add("--decode-tp", type=int, default=1, help="ranks of each (1)")
    add("--capture-tokens", type=int, default=512, help="of prefill workers (512)")
    add("--shape", default="llama-3.1-8b", help="of the random weights, on GPUs (llama-3.1-8b)")
    add("--kv-bytes", type=int, default=40 << 30, help="KV memory of each worker on a GPU (40 GiB)")
    add("--prompts", type=int, nargs="+", default=[2048, 8192], help="prompt lengths, tokens (2048 8192)")
    add("--repeats", type=int, default=P99_FROM, help=f"requests of each length, at most ({P99_FROM})")
    add("--limit", type=float, default=85.0, help="seconds for everything; fewer repeats if need be (85)")
    add("--rates", type=float, nargs="*", default=[8.0], help="requests/s while gaps are measured (8)")
    add("--load-seconds", type=float, default=10.0, help="of arrivals at each rate (10)")
    add("--output-tokens", type=int, default=200, help="tokens of each answer under load (200)")
    add("--skip-check", action="store_true", help="do not compare with the CPU first")
    add("--skip-rounding", action="store_true", help="do not compare outputs with and without a hand-off")
    add("--tolerance", type=float, default=TOLERANCE, help=f"of logprobs where outputs part ({TOLERANCE})")
    add("--out", type=Path, help="a JSON file")
    add("--logs", type=Path, help="a directory in which the processes' logs stay (they are deleted)")
    args = parser.parse_args()
    if topology_of(args).num_devices > args.devices:
        parser.error(f"{topology_of(args)} needs {topology_of(args).num_devices} devices, there are {args.devices}")
    if args.logs:
        args.logs.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(measure(args, args.logs or Path(directory)))


if __name__ == "__main__":
    main()
