"""Throughput of one connection between two processes: `python -m benchmarks.transport [ucx|nccl] [progress]`.

From GPU 0 to GPU 1 where there are two, else over host memory. The bytes of every round are compared before the rate is
printed, by message size and number in flight, with the lane. It knows nothing of KV blocks.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time

import torch

from common.transport.base import Connection, Endpoint
from common.transport.registry import open_endpoint
from common.transport.ucx_worker import Progress

MIB = 1 << 20
ON_GPU = torch.cuda.device_count() >= 2
CASES = [(MIB, 1), (16 * MIB, 1), (16 * MIB, 4), (32 * MIB, 2), (64 * MIB, 1), (64 * MIB, 2)]  # (num_bytes, in flight)
NUM_ROUNDS = 12
NUM_WARMUP = 3


async def open_end(scheme: str, progress: str, name: str, device: torch.device) -> Endpoint:
    memory = str(device) if device.type == "cuda" else "host"
    return await open_endpoint(f"{scheme}://127.0.0.1:0", name, progress=Progress(progress), memory=memory)


async def send_side(scheme: str, progress: str, address: str) -> None:
    device = device_of(0)
    endpoint = await open_end(scheme, progress, "sender", device)
    connection = await endpoint.connect(address, 60.0)
    rounds = [(case, i) for case in range(len(CASES)) for i in range(NUM_ROUNDS + NUM_WARMUP)]
    go_aheads = [connection.post_receive(go_tag(*one), filled(1, 0, device)) for one in rounds]
    print("ready", flush=True)
    for (case, round_), go_ahead in zip(rounds, go_aheads, strict=True):
        num_bytes, depth = CASES[case]
        buffers = [filled(num_bytes, round_ + i + 1, device) for i in range(depth)]
        await go_ahead.wait()
        await asyncio.gather(*(connection.send(tag_of(case, round_, i), one) for i, one in enumerate(buffers)))
    await connection.drained()
    await endpoint.close()


async def receive_side(scheme: str, progress: str) -> None:
    device = device_of(1)
    endpoint = await open_end(scheme, progress, "receiver", device)
    arguments = ("-m", "benchmarks.transport", scheme, progress, "--address", endpoint.address)
    child = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    assert await child.stdout.readline() == b"ready\n", "the sending process could not start"
    connection = await endpoint.wait_for_peer("sender", 60.0)
    for case, (num_bytes, depth) in enumerate(CASES):
        buffers = [filled(num_bytes, 0, device) for _ in range(depth)]
        times = [await one_round(connection, case, i, buffers) for i in range(NUM_ROUNDS + NUM_WARMUP)]
        median = sorted(times[NUM_WARMUP:])[NUM_ROUNDS // 2]
        rate = num_bytes * depth / median / 1e9
        print(f"{num_bytes // MIB:4d} MiB x {depth}  {rate:8.2f} GB/s  lane {connection.lane}", flush=True)
    await connection.close()
    await child.wait()
    await endpoint.close()


async def one_round(connection: Connection, case: int, round_: int, buffers: list[torch.Tensor]) -> float:
    """Seconds from the go-ahead to the last byte."""
    receives = [connection.post_receive(tag_of(case, round_, i), one) for i, one in enumerate(buffers)]
    go_ahead = filled(1, 0, buffers[0].device)
    begin = time.perf_counter()
    await connection.send(go_tag(case, round_), go_ahead)
    for receive in receives:
        await receive.wait()
    elapsed = time.perf_counter() - begin
    for i, one in enumerate(buffers):
        assert bool((one == round_ + i + 1).all()), "not the bytes that were sent"
    return elapsed


def filled(num_bytes: int, value: int, device: torch.device) -> torch.Tensor:
    """uint8 [num_bytes], written before this returns."""
    buffer = torch.full((num_bytes,), value, dtype=torch.uint8, device=device)
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
    return buffer


def tag_of(case: int, round_: int, index: int) -> int:
    return case << 20 | round_ << 8 | index


def go_tag(case: int, round_: int) -> int:
    return 1 << 40 | tag_of(case, round_, 0)


def device_of(index: int) -> torch.device:
    return torch.device("cuda", index) if ON_GPU else torch.device("cpu")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scheme", choices=("ucx", "nccl"), nargs="?", default="ucx")
    parser.add_argument("progress", nargs="?", default="polling" if ON_GPU else "event")
    parser.add_argument("--address", help="of the receiving end: be the sending end")
    arguments = parser.parse_args()
    if arguments.address is None:
        asyncio.run(receive_side(arguments.scheme, arguments.progress))
    else:
        asyncio.run(send_side(arguments.scheme, arguments.progress, arguments.address))


if __name__ == "__main__":
    main()
