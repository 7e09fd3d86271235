"""How much sending the KV cache of a prompt, layer by layer while it is computed, slows its computation down.

    python -m benchmarks.prefill_slowdown [--device cuda] [--tokens 8192] [--repeats 40] [--out FILE.json] [--check]

One prefill and one decode worker. Prompts of one length, each its own, one at a time: by turns one is handed off as
always, through the router, and one is sent to the prefill worker alone with a ticket for a decode worker that is here
and never answers, so that nothing is offered. (A request for one token would not do: chunks leave before it is known
that the first token is the last.) Compared are the prefill time that the worker reports and its steps' time on the
device. *Control*: the prompts that were not sent, every other one against the rest. With --check the exit status is 1
if a limit is missed. Without GPUs it is a rehearsal with the shipped checkpoint: both workers share the processor.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
from baton.v1 import decode_pb2, decode_pb2_grpc, kv_pb2, prefill_pb2, prefill_pb2_grpc, sampling_pb2

from benchmarks.goodput import GPU_ARGS, SHIPPED, write_model
from benchmarks.gpu_path_check import FLOAT32, deployed, random_prompt
from benchmarks.limits import Limit, exit_status
from cli.client import Client
from cli.deployment import Deployment, DeploymentSpec
from cli.scrape import scrape
from common.errors import Unavailable
from common.rpc.client import open_channel
from common.rpc.server import RpcServer
from common.worker.free_port import free_ports
from tests.integration.requests import ask, greedy_request

MAX_MESSAGE_BYTES: Final = 16 << 20
TIMEOUT_S: Final = 60.0
NUM_WARM_UPS: Final = 3
LIMITS: Final = (Limit("slowdown", "<=", 0.02), Limit("device_slowdown", "<=", 0.02))


@dataclass(frozen=True, slots=True)
class Prefilled:
    """One prompt in the prefill worker."""

    prefill_ms: float  # first chunk scheduled to first token sampled
    steps_ms: float  # of that, steps on the device
    bytes_shipped: int


class SilentDecode(decode_pb2_grpc.DecodeServicer):
    """Takes hand-offs and says nothing: their prefill worker waits for leave to offer chunks."""

    async def Session(  # type: ignore[override] # noqa: N802
        self,
        requests: AsyncIterable[decode_pb2.SessionRequest],
        context: grpc.aio.ServicerContext[decode_pb2.SessionRequest, decode_pb2.SessionResponse],
    ) -> None:
        raise Unavailable("there is no decode worker here")

    async def Handoff(  # type: ignore[override] # noqa: N802
        self,
        requests: AsyncIterable[kv_pb2.HandoffRequest],
        context: grpc.aio.ServicerContext[kv_pb2.HandoffRequest, kv_pb2.HandoffResponse],
    ) -> None:
        async for _ in requests:
            pass


class Bench:
    """Sends prompts to a deployment, with and without a hand-off."""

    def __init__(
        self, client: Client, prefill: prefill_pb2_grpc.PrefillAsyncStub, ticket: kv_pb2.Ticket, url: str
    ) -> None:
        """ticket: for a decode worker that never answers. url: the prefill worker's metrics."""
        self._client, self._prefill, self._ticket, self._url = client, prefill, ticket, url
        self._num_sequences = 0

    async def sent(self, prompt: Sequence[int]) -> Prefilled:
        """Two tokens: the second comes when everything has been handed off."""
        before_s = await self._steps_s()
        answer = await ask(self._client, greedy_request(list(prompt), 2), TIMEOUT_S)
        lifetime = answer.lifetime
        assert len(answer.tokens) == 2
        assert lifetime.num_blocks_reused == lifetime.num_cached_tokens == 0, "a cache had the prompt"
        assert lifetime.num_chunks_resent == 0
        return Prefilled(lifetime.prefill_ns / 1e6, (await self._steps_s() - before_s) * 1e3, lifetime.bytes_shipped)

    async def kept(self, prompt: Sequence[int]) -> Prefilled:
        """One token, and nothing leaves the worker."""
        before_s = await self._steps_s()
        self._num_sequences += 1
        sampling = sampling_pb2.SamplingParams(temperature=0.0, max_tokens=1, seed=0, ignore_eos=True)
        sequence = kv_pb2.Sequence(
            request_id=f"kept-{self._num_sequences}",
            sequence_id=self._num_sequences,
            token_ids=prompt,
            num_prompt_tokens=len(prompt),
            sampling=sampling,
            timeout_ns=int(TIMEOUT_S * 1e9),
        )
        ticket = kv_pb2.Ticket(ticket_id=self._num_sequences)
        ticket.MergeFrom(self._ticket)
        call = self._prefill.Prefill(prefill_pb2.PrefillRequest(sequence=sequence, ticket=ticket), timeout=TIMEOUT_S)
        responses = [response async for response in call]
        completed = responses[-1].completed
        assert responses[0].HasField("first_token")
        assert completed.bytes_shipped == completed.num_cached_tokens == 0
        return Prefilled(completed.prefill_ns / 1e6, (await self._steps_s() - before_s) * 1e3, 0)

    async def _steps_s(self) -> float:
        """Time of all steps so far."""
        seen = await scrape(self._url, TIMEOUT_S)
        return seen.total("baton_prefill_step_duration_seconds_sum")


async def tickets_of(decode_address: str) -> kv_pb2.Ticket:
    """What tickets of a decode worker say, but for their ids."""
    async with open_channel(decode_address, MAX_MESSAGE_BYTES) as channel:
        stub: decode_pb2_grpc.DecodeAsyncStub = decode_pb2_grpc.DecodeStub(channel)
        call = stub.Session(timeout=TIMEOUT_S)
        begin = decode_pb2.SessionBegin(session_id="benchmark")
        await call.write(decode_pb2.SessionRequest(begin=begin))
        async for response in call:
            if response.HasField("tickets") and response.tickets.rank_addresses:
                call.cancel()
                return response.tickets
    raise AssertionError("the decode worker ended its session before it had ranks")


@asynccontextmanager
async def bench(deployment: Deployment, client: Client, metrics_port: int) -> AsyncIterator[Bench]:
    """A ticket names the decode worker's ranks, which prefill connects to, and our server for the hand-off."""
    server = RpcServer("127.0.0.1:0", max_message_bytes=MAX_MESSAGE_BYTES)
    server.add(decode_pb2_grpc.add_DecodeServicer_to_server, SilentDecode(), "baton.v1.Decode")
    port = await server.start()
    try:
        ticket = await tickets_of(deployment.decode[0].address)
        ticket.ClearField("ticket_id")
        ticket.handoff_address = f"127.0.0.1:{port}"
        async with open_channel(deployment.prefill[0].address, MAX_MESSAGE_BYTES) as channel:
            stub: prefill_pb2_grpc.PrefillAsyncStub = prefill_pb2_grpc.PrefillStub(channel)
            yield Bench(client, stub, ticket, f"http://127.0.0.1:{metrics_port}/metrics")
    finally:
        await server.stop(0.0)


async def measure(args: argparse.Namespace, directory: Path) -> tuple[list[Prefilled], list[Prefilled]]:
    """Prompts that were sent, and prompts that were kept, by turns; which comes first changes from pair to pair."""
    on_gpu = args.device == "cuda"
    (metrics_port,) = free_ports(1)
    common = (*GPU_ARGS, "--kv-bytes", str(args.kv_bytes)) if on_gpu else FLOAT32
    spec = DeploymentSpec(
        model=write_model(args.shape, directory) if on_gpu else SHIPPED,
        device=args.device,
        prefill_args=(*common, "--metrics-port", str(metrics_port)),
        decode_args=common,
        log_dir=directory / "logs",
    )
    async with deployed(spec) as (deployment, client), bench(deployment, client, metrics_port) as own:
        vocab_size = (await client.model_info()).vocab_size
        sent: list[Prefilled] = []
        kept: list[Prefilled] = []
        for pair in range(args.repeats + NUM_WARM_UPS):
            prompts = [random_prompt(args.tokens, vocab_size, 2 * pair + index) for index in range(2)]
            if pair % 2:
                sent.append(await own.sent(prompts[0]))
                kept.append(await own.kept(prompts[1]))
            else:
                kept.append(await own.kept(prompts[1]))
                sent.append(await own.sent(prompts[0]))
        return sent[NUM_WARM_UPS:], kept[NUM_WARM_UPS:]


def compare(sent: Sequence[Prefilled], kept: Sequence[Prefilled]) -> dict[str, float]:
    """Medians in milliseconds; slowdowns as shares of the time without sending."""
    medians = {
        f"{name}_{what}_ms": statistics.median(getattr(one, f"{what}_ms") for one in prefilled)
        for what in ("prefill", "steps")
        for name, prefilled in (("sent", sent), ("kept", kept))
    }
    odd, even = (statistics.median(one.prefill_ms for one in kept[start::2]) for start in (1, 0))
    return medians | {
        "slowdown": medians["sent_prefill_ms"] / medians["kept_prefill_ms"] - 1,
        "device_slowdown": medians["sent_steps_ms"] / medians["kept_steps_ms"] - 1,
        "control": odd / even - 1,
        "sent_mb": statistics.median(one.bytes_shipped for one in sent) / 1e6,
    }


def print_table(found: dict[str, float], num_tokens: int, repeats: int) -> None:
    print(f"prompts of {num_tokens} tokens, {repeats} of each kind; {found['sent_mb']:.1f} MB sent of one; p50, ms")
    print("| | sent | not sent | slowdown |\n|---|---|---|---|")
    rows = (("prefill", "prefill", "slowdown"), ("its steps on the device", "steps", "device_slowdown"))
    for name, what, slowdown in rows:
        ms = f"{found[f'sent_{what}_ms']:.2f} | {found[f'kept_{what}_ms']:.2f}"
        print(f"| {name} | {ms} | {found[slowdown]:+.2%} |")
    print(f"| control: prefill, not sent | | | {found['control']:+.2%} |", flush=True)


def main() -> int:
    """Measure and print. Returns 1 if limits were to be checked and one is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="where ranks compute (cpu)")
    add("--shape", default="llama-3.1-8b", help="of the random weights, on GPUs (llama-3.1-8b)")
    add("--tokens", type=int, help="of a prompt (8192; on a CPU 1024)")
    add("--repeats", type=int, default=40, help="prompts of each kind, at least 2 (40)")
    add("--kv-bytes", type=int, default=20 << 30, help="KV memory of each worker on a GPU (20 GiB)")
    add("--out", type=Path, help="a JSON file")
    add("--check", action="store_true", help="exit with 1 if a limit is missed")
    args = parser.parse_args()
    args.tokens = args.tokens or (8192 if args.device == "cuda" else 1024)
    with tempfile.TemporaryDirectory() as directory:
        sent, kept = asyncio.run(measure(args, Path(directory)))
    found = compare(sent, kept)
    print_table(found, args.tokens, args.repeats)
    if args.out:
        args.out.write_text(json.dumps({"tokens": args.tokens, "repeats": args.repeats} | found, indent=1))
    return exit_status(found, LIMITS) if args.check else 0


if __name__ == "__main__":
    sys.exit(main())
