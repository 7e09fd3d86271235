"""What telemetry costs: decode steps of a deployment that is scraped and traced, against one that is not.

    python -m benchmarks.telemetry

Three deployments of one prefill and one decode worker stand side by side and take turns under the same load. One has
metrics ports, which are scraped every second, and sends the spans of every request to a collector here; two have
neither, and how they differ from each other is what this machine cannot tell apart. The time of a step is the gap
between two messages of a stream. Counting itself is always on: its cost per step is timed on its own.

The limit: a step takes at most 1.01 times as long with telemetry. The clock can tell that only on a machine that
nobody else uses, with cores to spare for nine processes. Where it cannot, processor time decides: only fronts do
anything for telemetry, so a step is longer by at most what the decode front, all threads of it, needs more for each
step. That leaves out what the router's and the prefill worker's telemetry may take from others where cores are short.
The status is 0 if the limit is kept, 1 if not, and 3 if neither measure can tell (more --rounds may help).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import grpc
from baton.v1 import inference_pb2, sampling_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

from benchmarks.telemetry_verdict import MAX_COST, MIN_ROUNDS, Verdict, interval_of_median, judge, spread_of
from cli.client import Client, connect
from cli.deployment import Deployment, DeploymentSpec
from cli.scrape import scrape
from cli.up import DEFAULT_MODEL
from common.telemetry.step_clock import StepClock
from common.worker.free_port import free_ports
from services.decode.metrics import DecodeMetrics

NUM_PROMPT_TOKENS = 64
VOCAB_SIZE = 4096
SCRAPE_INTERVAL_S = 1.0
ROLES = ("router", "prefill", "decode")
VARIANTS = ("off", "on", "off again")


class _Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Counts spans."""

    def __init__(self) -> None:
        self.num_spans = 0

    async def Export(  # noqa: N802 - the name in the proto
        self, request: trace_service_pb2.ExportTraceServiceRequest, context: object
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        self.num_spans += sum(len(scope.spans) for spans in request.resource_spans for scope in spans.scope_spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@contextlib.asynccontextmanager
async def _collecting() -> AsyncIterator[tuple[_Collector, str]]:
    collector, server = _Collector(), grpc.aio.server()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield collector, f"http://127.0.0.1:{port}"
    finally:
        await server.stop(0.0)


async def _scrape_for_ever(ports: list[int]) -> None:
    while True:
        for port in ports:
            await scrape(f"http://127.0.0.1:{port}/metrics", timeout_s=5.0)
        await asyncio.sleep(SCRAPE_INTERVAL_S)


async def _gaps_of(client: Client, prompt: list[int], num_tokens: int) -> list[float]:
    """Seconds between the messages of one stream. The first gap, which has the hand-off in it, is left out."""
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=sampling_pb2.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True),
    )
    times = [time.perf_counter() async for _ in client.generate(request, 300.0)]
    return [after - before for before, after in pairwise(times[1:])]


async def _step_s(client: Client, source: random.Random, num_streams: int, num_tokens: int) -> float:
    """The median gap of all streams of one round, which start together."""
    prompts = [[source.randrange(VOCAB_SIZE) for _ in range(NUM_PROMPT_TOKENS)] for _ in range(num_streams)]
    gaps = await asyncio.gather(*(_gaps_of(client, prompt, num_tokens) for prompt in prompts))
    return statistics.median(gap for stream in gaps for gap in stream)


def _spec(logs: Path, ports: list[int], endpoint: str) -> DeploymentSpec:
    """With telemetry if there are ports."""
    args: dict[str, tuple[str, ...]] = dict.fromkeys(ROLES, ())
    for role, port in zip(ROLES, ports, strict=False):
        args[role] = ("--metrics-port", str(port), "--otlp-endpoint", endpoint)
    return DeploymentSpec(
        model=DEFAULT_MODEL,
        router_args=args["router"],
        prefill_args=args["prefill"],
        decode_args=args["decode"],
        log_dir=logs,
    )


def _processor_s(pid: int) -> float:
    """What all threads of a process have used so far."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


async def _front_s(deployment: Deployment) -> tuple[float, int]:
    """Processor time of the decode front, and steps that it has planned."""
    status = await deployment.status(deployment.decode[0])
    return _processor_s(deployment.decode[0].pid), status.counters["steps"]


@dataclass(frozen=True, slots=True)
class Rounds:
    """Seconds of a step, and of the decode front for each step, by deployment, a value for each round."""

    step_s: dict[str, list[float]]
    front_s: dict[str, list[float]]

    def step_costs(self, name: str) -> list[float]:
        """What a step takes more than without telemetry, as a share. Within a round, so what slows all cancels out."""
        return [own_s / off_s - 1 for own_s, off_s in zip(self.step_s[name], self.step_s["off"], strict=True)]

    def front_costs(self, name: str) -> list[float]:
        """What the front needs more, as a share of the step."""
        rounds = zip(self.front_s[name], self.front_s["off"], self.step_s["off"], strict=True)
        return [(own_s - off_s) / step_s for own_s, off_s, step_s in rounds]


async def measure(num_streams: int, num_tokens: int, num_rounds: int) -> Rounds:
    """Let the deployments take turns."""
    rounds = Rounds({name: [] for name in VARIANTS}, {name: [] for name in VARIANTS})
    async with contextlib.AsyncExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        collector, endpoint = await stack.enter_async_context(_collecting())
        ports = free_ports(len(ROLES))
        clients: dict[str, Client] = {}
        deployments: dict[str, Deployment] = {}
        for name in VARIANTS:
            spec = _spec(logs / name, ports if name == "on" else [], endpoint)
            deployment = await stack.enter_async_context(Deployment(spec))
            await deployment.ready(120.0)
            deployments[name] = deployment
            clients[name] = await stack.enter_async_context(connect(deployment.router_address))
        scraping = asyncio.create_task(_scrape_for_ever(ports))
        stack.callback(scraping.cancel)
        for number in range(num_rounds + 1):
            for turn in range(len(VARIANTS)):
                name = VARIANTS[(number + turn) % len(VARIANTS)]
                used_s, num_steps = await _front_s(deployments[name])
                step_s = await _step_s(clients[name], random.Random(number), num_streams, num_tokens)
                used_after_s, num_steps_after = await _front_s(deployments[name])
                if number:  # the first round warms up
                    rounds.step_s[name].append(step_s)
                    rounds.front_s[name].append((used_after_s - used_s) / (num_steps_after - num_steps))
    assert collector.num_spans > num_rounds * num_streams, "the spans did not arrive"
    return rounds


def figures_of(rounds: Rounds) -> dict[str, float]:
    """Medians over rounds; of costs, the interval too."""
    figures = {"counting, us per step": counting_s() * 1e6}
    for what, times_s in (("step", rounds.step_s), ("front per step", rounds.front_s)):
        figures |= {f"{what}, {name}, ms": statistics.median(times) * 1e3 for name, times in times_s.items()}
    for name in VARIANTS[1:]:
        for what, costs in (("step", rounds.step_costs(name)), ("front", rounds.front_costs(name))):
            interval = interval_of_median(costs)
            figures |= {
                f"{what} cost, {name}, % of a step": statistics.median(costs) * 100,
                f"{what} cost, {name}, at least": interval.low * 100,
                f"{what} cost, {name}, at most": interval.high * 100,
            }
    return figures


def verdict_of(rounds: Rounds) -> Verdict:
    """By the clock; where that cannot tell, by processor time. Prints both."""
    by_clock = judge(rounds.step_costs("on"), rounds.step_costs("off again"))
    by_processor = judge(rounds.front_costs("on"), rounds.front_costs("off again"))
    limit = f"{MAX_COST:.0%} of a step's time"
    for what, verdict, control in (
        ("clock", by_clock, rounds.step_costs("off again")),
        ("processor time", by_processor, rounds.front_costs("off again")),
    ):
        said = verdict.name.lower().replace("_", " ")
        print(f"at most {limit}, by {what}: {said} (the control is within {spread_of(control):.2%})")
    return by_processor if by_clock is Verdict.CANNOT_TELL else by_clock


def counting_s(num_steps: int = 20_000, num_repeats: int = 7) -> float:
    """Seconds of all that a decode front counts in one step: the median of several runs."""
    metrics = DecodeMetrics()
    clock = StepClock(lambda idle_ns: metrics.inc("idle_ns", idle_ns), metrics.step_gap)
    runs = []
    for _ in range(num_repeats):
        begun = time.perf_counter()
        for _ in range(num_steps):
            clock.submitted()
            metrics.inc("steps")
            metrics.step_rows.observe(64)
            metrics.step_tokens.observe(64)
            metrics.inc("tokens", 64)
            metrics.inc("tokens_discarded", 0)
            metrics.step_duration.observe(0.0042)
            clock.answered(1, True)
        runs.append((time.perf_counter() - begun) / num_steps)
    return statistics.median(runs)


def main() -> int:
    """Measure, print and judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=8, help="streams at once (8)")
    parser.add_argument("--tokens", type=int, default=150, help="tokens per stream (150)")
    parser.add_argument("--rounds", type=int, default=15, help=f"rounds after the first, at least {MIN_ROUNDS} (15)")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    if args.rounds < MIN_ROUNDS:
        parser.error(f"--rounds {args.rounds}: at least {MIN_ROUNDS}, or nothing can be said")
    rounds = asyncio.run(measure(args.streams, args.tokens, args.rounds))
    figures = figures_of(rounds)
    for name, value in figures.items():
        print(f"{name:48} {value:10.4f}")
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")
    return verdict_of(rounds).value


if __name__ == "__main__":
    sys.exit(main())
