"""What the router itself costs: one router process between a client and workers that answer at once.

    python -m benchmarks.router [--streams 128] [--requests 10000] [--check]

Three processes: this one is the client, the fakes and the router are children. Measured are client messages per
second with many streams, latency added to a request when nothing else runs, and resident memory over many requests.
With --check the exit status is 1 if a limit is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterable, AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import psutil  # type: ignore[import-untyped]
from baton.v1 import (
    decode_pb2,
    decode_pb2_grpc,
    inference_pb2,
    inference_pb2_grpc,
    kv_pb2,
    prefill_pb2,
    prefill_pb2_grpc,
    sampling_pb2,
    worker_pb2,
    worker_pb2_grpc,
)

from benchmarks.limits import Limit, exit_status
from common.rpc.client import open_channel
from common.rpc.server import RpcServer
from tests.router.byte_checkpoint import write_byte_checkpoint

MAX_MESSAGE_BYTES = 16 << 20
LETTER = 66
LIMITS = (
    Limit("messages_per_s", ">=", 10_000),
    Limit("added_p50_ms", "<=", 1.5),
    Limit("rss_after_all_mb", "<", 250),
)


class InstantWorkers(worker_pb2_grpc.WorkerServicer, decode_pb2_grpc.DecodeServicer, prefill_pb2_grpc.PrefillServicer):
    """A worker of one role. Decode gives every open sequence one token per step, all in one batch."""

    def __init__(self, role: worker_pb2.WorkerRole.ValueType, step_s: float) -> None:
        self._status = worker_pb2.WorkerStatus(
            worker_id=f"fake-{role}",
            role=role,
            state=worker_pb2.WORKER_STATE_READY,
            layout_fingerprint="f",
            block_size=64,
        )
        self._step_s = step_s
        self._running: dict[int, list[int]] = {}  # sequence -> [next position, max_tokens]

    async def WatchStatus(  # noqa: N802
        self, request: worker_pb2.WatchStatusRequest, context: Any
    ) -> AsyncIterator[worker_pb2.WorkerStatus]:
        yield self._status
        await asyncio.Event().wait()

    async def GetStatus(self, request: worker_pb2.GetStatusRequest, context: Any) -> worker_pb2.WorkerStatus:  # noqa: N802
        return self._status

    async def Drain(self, request: worker_pb2.DrainRequest, context: Any) -> worker_pb2.DrainResponse:  # noqa: N802
        return worker_pb2.DrainResponse()

    async def Session(  # type: ignore[override]  # noqa: N802
        self, request_iterator: AsyncIterator[decode_pb2.SessionRequest], context: Any
    ) -> None:
        await anext(request_iterator)
        tickets = kv_pb2.Ticket(handoff_address="nowhere:1", rank_addresses=["fake://0"])
        await context.write(decode_pb2.SessionResponse(tickets=tickets))
        async with asyncio.TaskGroup() as tasks:
            writing = asyncio.Lock()  # a stream takes one message at a time
            tasks.create_task(self._send_steps(context, writing))
            async for request in request_iterator:
                if request.HasField("open"):
                    async with writing:
                        await context.write(decode_pb2.SessionResponse(opened=[self._open(request.open)]))
                else:
                    self._running.pop(request.close.sequence_id, None)

    async def _send_steps(self, context: Any, writing: asyncio.Lock) -> None:
        next_step_s = time.monotonic()
        while True:
            next_step_s = max(next_step_s + self._step_s, time.monotonic())
            await asyncio.sleep(next_step_s - time.monotonic())
            if self._running:
                async with writing:
                    await context.write(self._step())

    def _step(self) -> decode_pb2.SessionResponse:
        batch = decode_pb2.SessionResponse()
        for sequence_id, state in list(self._running.items()):
            entry = batch.sequences.add(sequence_id=sequence_id, first_position=state[0], token_ids=(LETTER,))
            state[0] += 1
            if state[0] >= state[1]:
                entry.end = decode_pb2.SEQUENCE_END_FINISHED
                entry.finish_reason = sampling_pb2.FINISH_REASON_LENGTH
                del self._running[sequence_id]
        return batch

    def _open(self, request: decode_pb2.OpenRequest) -> decode_pb2.OpenResponse:
        sequence = request.sequence
        if sequence.sampling.max_tokens > 1:
            self._running[sequence.sequence_id] = [1, sequence.sampling.max_tokens]
        return decode_pb2.OpenResponse(sequence_id=sequence.sequence_id)

    def Handoff(self, request_iterator: Any, context: Any) -> Any:  # noqa: N802
        raise NotImplementedError

    async def Prefill(  # noqa: N802
        self, request: prefill_pb2.PrefillRequest, context: Any
    ) -> AsyncIterator[prefill_pb2.PrefillResponse]:
        first = prefill_pb2.FirstToken(token_id=LETTER)
        if request.sequence.sampling.max_tokens == 1:
            first.finish_reason = sampling_pb2.FINISH_REASON_LENGTH
        yield prefill_pb2.PrefillResponse(first_token=first)
        yield prefill_pb2.PrefillResponse(completed=prefill_pb2.PrefillCompleted(prefill_ns=1))


async def serve_fakes(step_s: float) -> None:
    """The child process with both workers; prints their addresses."""
    addresses = []
    servers = []
    for role in (worker_pb2.WORKER_ROLE_PREFILL, worker_pb2.WORKER_ROLE_DECODE):
        workers = InstantWorkers(role, step_s)
        server = RpcServer("127.0.0.1:0", max_message_bytes=MAX_MESSAGE_BYTES)
        server.add(worker_pb2_grpc.add_WorkerServicer_to_server, workers, "baton.v1.Worker")
        server.add(decode_pb2_grpc.add_DecodeServicer_to_server, workers, "baton.v1.Decode")
        server.add(prefill_pb2_grpc.add_PrefillServicer_to_server, workers, "baton.v1.Prefill")
        addresses.append(f"127.0.0.1:{await server.start()}")
        servers.append(server)
    print(json.dumps(addresses), flush=True)
    await asyncio.Event().wait()


def generate_request(max_tokens: int) -> inference_pb2.GenerateRequest:
    request = inference_pb2.GenerateRequest(text="hello there")
    request.sampling.max_tokens = max_tokens
    request.sampling.temperature = 0.0
    return request


async def measure_throughput(channel: grpc.aio.Channel, streams: int, seconds: float) -> dict[str, float]:
    """Messages and tokens per second with so many streams at a time, once all of them run."""
    # Raw bytes: the client's own parsing is none of the router's cost.
    method: grpc.aio.UnaryStreamMultiCallable[inference_pb2.GenerateRequest, bytes] = channel.unary_stream(
        "/baton.v1.Inference/Generate",
        request_serializer=inference_pb2.GenerateRequest.SerializeToString,
    )
    num_messages = num_requests = 0
    request = generate_request(400)

    async def one_client() -> None:
        nonlocal num_messages, num_requests
        while True:
            async for _ in method(request):
                num_messages += 1
            num_requests += 1

    clients = [asyncio.create_task(one_client()) for _ in range(streams)]
    await asyncio.sleep(2.0)
    started_s, messages_before, requests_before = time.monotonic(), num_messages, num_requests
    await asyncio.sleep(seconds)
    elapsed_s = time.monotonic() - started_s
    for client in clients:
        client.cancel()
    await asyncio.wait(clients)
    return {
        "messages_per_s": (num_messages - messages_before) / elapsed_s,
        "requests_per_s": (num_requests - requests_before) / elapsed_s,
    }


async def measure_latency(channel: grpc.aio.Channel, prefill_address: str, repeats: int = 800) -> dict[str, float]:
    """Time to the one token of a request, one after the other: through the router, and straight from prefill."""
    inference: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(channel)
    direct_channel = open_channel(prefill_address, MAX_MESSAGE_BYTES)
    prefill: prefill_pb2_grpc.PrefillAsyncStub = prefill_pb2_grpc.PrefillStub(direct_channel)
    request = generate_request(1)
    direct_request = prefill_pb2.PrefillRequest()
    direct_request.sequence.sampling.max_tokens = 1
    routed_ms, direct_ms = [], []
    for _ in range(4):
        for _ in range(repeats // 4):
            routed_ms.append(await _first_message_ms(inference.Generate(request)))
        for _ in range(repeats // 4):
            direct_ms.append(await _first_message_ms(prefill.Prefill(direct_request)))
    await direct_channel.close()
    routed, direct = statistics.median(routed_ms), statistics.median(direct_ms)
    return {"routed_p50_ms": routed, "direct_p50_ms": direct, "added_p50_ms": routed - direct}


async def _first_message_ms(call: AsyncIterable[object]) -> float:
    started_s = time.perf_counter()
    responses = aiter(call)
    await anext(responses)
    elapsed_ms = (time.perf_counter() - started_s) * 1e3
    async for _ in responses:
        pass
    return elapsed_ms


async def measure_memory(channel: grpc.aio.Channel, router_pid: int, num_requests: int) -> dict[str, float]:
    """Resident memory of the router after a tenth of the requests and after all of them."""
    inference: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(channel)
    process = psutil.Process(router_pid)
    request = generate_request(4)

    async def some_requests(count: int) -> None:
        for _ in range(count):
            async for _ in inference.Generate(request):
                pass

    at_start = process.memory_info().rss / 1e6
    await asyncio.gather(*(some_requests(num_requests // 320) for _ in range(32)))
    at_tenth = process.memory_info().rss / 1e6
    await asyncio.gather(*(some_requests(num_requests * 9 // 320) for _ in range(32)))
    return {
        "rss_start_mb": at_start,
        "rss_after_tenth_mb": at_tenth,
        "rss_after_all_mb": process.memory_info().rss / 1e6,
    }


async def run_benchmark(options: argparse.Namespace) -> dict[str, float]:
    """Start the children, measure, print, and end the children."""
    fakes = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.router", "--fakes", "--step-s", str(options.step_s),
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert fakes.stdout is not None
    prefill, decode = json.loads(await fakes.stdout.readline())
    with tempfile.TemporaryDirectory() as directory:
        write_byte_checkpoint(Path(directory))
        command = [sys.executable, *options.profiler, "-m", "services.router"]
        command += ["--listen", f"127.0.0.1:{options.port}", "--model", directory, "--log-level", "WARNING"]
        router = await asyncio.create_subprocess_exec(*command, "--prefill", prefill, "--decode", decode)
        channel = open_channel(f"127.0.0.1:{options.port}", MAX_MESSAGE_BYTES)
        try:
            inference: inference_pb2_grpc.InferenceAsyncStub = inference_pb2_grpc.InferenceStub(channel)
            async for _ in inference.Generate(generate_request(4), wait_for_ready=True):
                pass
            results = await measure_latency(channel, prefill)
            results |= await measure_throughput(channel, options.streams, options.seconds)
            if options.requests:
                results |= await measure_memory(channel, router.pid, options.requests)
            results["router_cpu_s"] = sum(psutil.Process(router.pid).cpu_times()[:2])
            print(json.dumps({name: round(value, 3) for name, value in results.items()}, indent=2))
            return results
        finally:
            await channel.close()
            for child in (router, fakes):
                child.terminate()
                await child.wait()


def main() -> int:
    """Parse the flags and run. Returns 1 if a limit was to be checked and is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--streams", type=int, default=128, help="streams at a time")
    parser.add_argument("--seconds", type=float, default=5.0, help="how long throughput is measured")
    parser.add_argument("--step-s", type=float, default=0.008, help="time between tokens of a stream, seconds")
    parser.add_argument("--requests", type=int, default=10_000, help="requests of the memory measurement; 0 is none")
    parser.add_argument("--port", type=int, default=50951, help="port of the router")
    parser.add_argument("--profiler", nargs="*", default=[], help="what goes between python and -m services.router")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is missed")
    parser.add_argument("--fakes", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.fakes:
        asyncio.run(serve_fakes(options.step_s))
        return 0
    results = asyncio.run(run_benchmark(options))
    return exit_status(results, LIMITS) if options.check else 0


if __name__ == "__main__":
    sys.exit(main())
