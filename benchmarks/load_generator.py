"""What the load generator itself can do, against a server that answers at once: measured and checked.

    python -m benchmarks.load_generator

Three processes: the server, one client process, and this one. The scheduling error is how long after its due time a
request was sent, its p99 the median of three rounds. Exits with 1 if a limit is missed. Other work on the machine
shows: the figures mean something only if it has two cores to itself.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web
from baton.v1 import inference_pb2, inference_pb2_grpc, sampling_pb2
from rich.console import Console
from rich.table import Table

from common.rpc.server import RpcServer
from loadtest.arrivals import Arrivals
from loadtest.generator import LoadTest, Observed, describe_target, run_load_test
from loadtest.lengths import Fixed
from loadtest.measured import measured_part
from loadtest.pacing import ClosedLoop
from loadtest.sizes import RandomSizes
from loadtest.statistics import Summary, summarize
from loadtest.targets.base import TargetSpec
from loadtest.targets.registry import KINDS
from loadtest.workload import Workload

MAX_LATENESS_P99_S = 1e-3
MIN_TOKENS_PER_S = 10_000
RATE_PER_S = 200.0
VOCAB_SIZE = 32_000
CONTEXT_LENGTH = 8_192
_MODEL = "instant"
_REQUESTS_PER_STREAM = 4
_ROUNDS = 3


class InstantInference(inference_pb2_grpc.InferenceServicer):
    """Answers with as many messages as tokens were asked for, without a pause."""

    async def Generate(  # noqa: N802
        self, request: inference_pb2.GenerateRequest, context: Any
    ) -> AsyncIterator[inference_pb2.GenerateResponse]:
        response = inference_pb2.GenerateResponse(token_ids=(1,), text_delta="x")
        for _ in range(request.sampling.max_tokens - 1):
            yield response
        yield inference_pb2.GenerateResponse(
            token_ids=(1,),
            text_delta="x",
            finish_reason=sampling_pb2.FINISH_REASON_LENGTH,
            usage=inference_pb2.Usage(num_output_tokens=request.sampling.max_tokens),
        )

    async def GetModelInfo(  # noqa: N802
        self, request: inference_pb2.GetModelInfoRequest, context: Any
    ) -> inference_pb2.GetModelInfoResponse:
        return inference_pb2.GetModelInfoResponse(
            model=_MODEL,
            context_length=CONTEXT_LENGTH,
            vocab_size=VOCAB_SIZE,
            num_prefill_workers=1,
            num_decode_workers=1,
            is_serving=True,
        )


async def _complete(request: web.Request) -> web.StreamResponse:
    max_tokens = (await request.json())["max_tokens"]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for _ in range(max_tokens):
        await response.write(b'data: {"id":"cmpl-1","object":"text_completion","choices":[{"index":0,"text":"x"}]}\n\n')
        await asyncio.sleep(0)  # the other streams' turn: a stream's messages shall not all come in one packet
    await response.write(b"data: [DONE]\n\n")
    return response


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": _MODEL, "max_model_len": CONTEXT_LENGTH}]})


async def serve(kind: str) -> None:
    """The child process: prints its port and serves until it is ended."""
    if kind == "baton":
        server = RpcServer("127.0.0.1:0", max_message_bytes=16 << 20)
        add = inference_pb2_grpc.add_InferenceServicer_to_server
        server.add(add, InstantInference(), "baton.v1.Inference")
        port = await server.start()
    else:
        app = web.Application()
        app.add_routes([web.get("/v1/models", _models), web.post("/v1/completions", _complete)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
    print(port, flush=True)
    await asyncio.Event().wait()


@asynccontextmanager
async def instant_server(kind: str) -> AsyncIterator[TargetSpec]:
    """A server in a process of its own, ended with the context."""
    command = (sys.executable, "-m", "benchmarks.load_generator", "--serve", kind)
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    try:
        assert process.stdout is not None
        port = int(await process.stdout.readline())
        address = f"127.0.0.1:{port}" if kind == "baton" else f"http://127.0.0.1:{port}"
        yield TargetSpec(kind, address, vocab_size=VOCAB_SIZE)
    finally:
        process.terminate()
        await process.wait()


async def measure(target: TargetSpec, workload: Workload) -> Summary:
    """One run with one client process. Every request must end well."""
    test = LoadTest(target, await describe_target(target), workload, timeout_s=60.0, num_warmup=16)
    summary = summarize(measured_part(await run_load_test(test, asyncio.Event(), Observed())))
    assert not summary.num_failed, summary.errors
    return summary


async def run_benchmark(options: argparse.Namespace) -> bool:
    """Measure every kind of target and print the table. Returns whether all limits were met."""
    table = Table("target", "measured", "value", "limit", "verdict")
    all_met = True
    scheduled = Workload(Arrivals(RATE_PER_S), RandomSizes(Fixed(512), Fixed(16)), 0, options.requests)
    streams = Workload(
        ClosedLoop(options.streams), RandomSizes(Fixed(64), Fixed(512)), 0, options.streams * _REQUESTS_PER_STREAM
    )
    for kind in KINDS:
        async with instant_server(kind) as target:
            rounds = [await measure(target, scheduled) for _ in range(_ROUNDS)]
            received = await measure(target, streams)
        # The median of some rounds: one round on a machine that is not alone says little about a tail.
        late_s = statistics.median(error.p99_s for round in rounds if (error := round.scheduling_error) is not None)
        tokens_per_s = received.output_tokens_per_s or 0.0
        is_punctual, is_fast = late_s <= MAX_LATENESS_P99_S, tokens_per_s >= MIN_TOKENS_PER_S
        all_met = all_met and is_punctual and is_fast
        what = f"sent - due, p99, at {RATE_PER_S:g} requests/s"
        table.add_row(kind, what, f"{late_s * 1e3:.2f} ms", f"<= {MAX_LATENESS_P99_S * 1e3:g} ms", _word(is_punctual))
        what = f"tokens/s received, {options.streams} streams, {received.tokens_per_message:.2f} a message"
        table.add_row(kind, what, f"{tokens_per_s:,.0f}", f">= {MIN_TOKENS_PER_S:,}", _word(is_fast))
    Console().print(table)
    return all_met


def _word(is_met: bool) -> str:
    return "met" if is_met else "MISSED"


def main() -> int:
    """Parse the flags and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000, help="requests of the scheduling measurement")
    parser.add_argument("--streams", type=int, default=64, help="streams of the throughput measurement")
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        asyncio.run(serve(options.serve))
        return 0
    return 0 if asyncio.run(run_benchmark(options)) else 1


if __name__ == "__main__":
    sys.exit(main())
