"""Throughput of one connection between two processes: `python -m benchmarks.transport [device] [progress]`.

Prints GB/s by message size and number in flight, and the lane. It knows nothing of KV blocks.
"""

from __future__ import annotations

import asyncio
import sys
import time

import torch

from common.transport.base import Connection
from common.transport.registry import open_endpoint
from common.transport.ucx_worker import Progress

MIB = 1 << 20
CASES = [(MIB, 1), (16 * MIB, 1), (16 * MIB, 4), (64 * MIB, 1), (64 * MIB, 2)]  # (num_bytes, in flight)
NUM_ROUNDS = 12
NUM_WARMUP = 3


async def send_side(address: str, device: str, progress: str) -> None:
    endpoint = await open_endpoint("ucx://127.0.0.1:0", "sender", progress=Progress(progress), memory=memory_of(device))
    connection = await endpoint.connect(address, 10.0)
    rounds = [(case, i) for case in range(len(CASES)) for i in range(NUM_ROUNDS + NUM_WARMUP)]
    go_aheads = [connection.post_receive(go_tag(*one), torch.zeros(1, dtype=torch.uint8)) for one in rounds]
    print("ready", flush=True)
    for (case, round_), go_ahead in zip(rounds, go_aheads, strict=True):
        num_bytes, depth = CASES[case]
        if round_ == 0:
            buffers = [torch.full((num_bytes,), 7, dtype=torch.uint8, device=device) for _ in range(depth)]
        await go_ahead.wait()
        sends = [connection.send(tag_of(case, round_, i), one) for i, one in enumerate(buffers)]
        await asyncio.gather(*sends)
    await connection.drained()
    await endpoint.close()


async def receive_side(device: str, progress: str) -> None:
    endpoint = await open_endpoint(
        "ucx://127.0.0.1:0", "receiver", progress=Progress(progress), memory=memory_of(device)
    )
    arguments = ("-m", "benchmarks.transport", device, progress, endpoint.address)
    child = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    await child.stdout.readline()  # the sender's receives are posted
    connection = await endpoint.wait_for_peer("sender", 60.0)
    for case, (num_bytes, depth) in enumerate(CASES):
        buffers = [torch.zeros(num_bytes, dtype=torch.uint8, device=device) for _ in range(depth)]
        times = [await one_round(connection, case, i, buffers) for i in range(NUM_ROUNDS + NUM_WARMUP)]
        median = sorted(times[NUM_WARMUP:])[NUM_ROUNDS // 2]
        rate = num_bytes * depth / median / 1e9
        print(f"{num_bytes // MIB:4d} MiB x {depth}  {rate:8.2f} GB/s  lane {connection.lane}")
    await connection.close()
    await child.wait()
    await endpoint.close()


async def one_round(connection: Connection, case: int, round_: int, buffers: list[torch.Tensor]) -> float:
    """Seconds from the go-ahead to the last byte."""
    receives = [connection.post_receive(tag_of(case, round_, i), one) for i, one in enumerate(buffers)]
    begin = time.perf_counter()
    await connection.send(go_tag(case, round_), torch.zeros(1, dtype=torch.uint8))
    for receive in receives:
        await receive.wait()
    return time.perf_counter() - begin


def tag_of(case: int, round_: int, index: int) -> int:
    return case << 20 | round_ << 8 | index


def go_tag(case: int, round_: int) -> int:
    return 1 << 40 | tag_of(case, round_, 0)


def memory_of(device: str) -> str:
    return "cuda" if device.startswith("cuda") else "host"


def main() -> None:
    torch.set_num_threads(1)
    device, progress, address = [*sys.argv[1:], "", "", ""][:3]
    device, progress = device or "cpu", progress or "event"
    if address:
        asyncio.run(send_side(address, device, progress))
    else:
        asyncio.run(receive_side(device, progress))


if __name__ == "__main__":
    main()
