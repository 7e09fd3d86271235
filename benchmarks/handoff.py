"""KV blocks from GPU 0 to GPU 1: gathered, sent, verified, scattered: `python -m benchmarks.handoff ucx|nccl`.

Two processes, blocks of an 8B model in shuffled order on both sides. Every leg's digest is checked as it arrives, every
block is compared afterwards, and a damaged leg must be refused; only then is the rate believed. Without GPUs it does
the same with a small model between two processes on the CPU.

`python -m benchmarks.handoff host-cost` takes one GPU and no transport: how long starting a gather and a scatter holds
up the thread that does it.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import cast

import torch

from common.errors import DigestMismatch
from common.kernels.backend import KernelBackend
from common.kvcache.layout import HEADER_BYTES
from common.kvcache.slot_copies import SlotCopies
from common.kvcache.storage import KVStorage
from common.transport.base import Connection
from common.transport.registry import open_endpoint
from common.transport.ucx_worker import Progress

ON_GPU = torch.cuda.device_count() >= 2
LAYERS, HEADS, BLOCK_SIZE, HEAD_DIM = (32, 8, 64, 128) if ON_GPU else (2, 2, 16, 32)
BLOCKS_HELD, BLOCKS_SENT = 192, 128  # 1 GiB of 8B blocks goes over
CASES = [(8, 2), (4, 4), (8, 3), (8, 4), (16, 2), (16, 3), (32, 2), (32, 3)]  # (blocks of 8 MiB in a slot, slots)
NUM_WARMUP = 2
GB = 1e9


@dataclass(frozen=True, slots=True)
class Leg:
    """One message. The tag says all that the sender must know."""

    case: int
    round: int
    number: int

    @property
    def tag(self) -> int:
        return self.case << 40 | self.round << 20 | self.number

    @classmethod
    def of(cls, tag: int) -> Leg:
        return cls(tag >> 40, tag >> 20 & 0xFFFFF, tag & 0xFFFFF)

    def blocks(self, ids: list[int]) -> list[int]:
        size = CASES[self.case][0]
        return ids[self.number * size : (self.number + 1) * size]


@dataclass(slots=True)
class Side:
    """What either process holds."""

    device: torch.device
    storage: KVStorage
    block_ids: list[int]
    copies: SlotCopies
    slots: dict[int, torch.Tensor] = field(default_factory=dict)  # by case: uint8 [num_slots, slot_bytes]
    copying_s: list[float] = field(default_factory=list)  # gathers or scatters

    @classmethod
    def make(cls, index: int, seed: int, in_thread: bool) -> Side:
        device = torch.device("cuda", index) if ON_GPU else torch.device("cpu")
        if ON_GPU:
            torch.cuda.set_device(device)
        kernels = cast(KernelBackend, importlib.import_module("common.kernels.triton_backend")) if ON_GPU else None
        storage = KVStorage(LAYERS, BLOCKS_HELD, HEADS, BLOCK_SIZE, HEAD_DIM, torch.bfloat16, device, kernels)
        ids = random.Random(index + 1).sample(range(BLOCKS_HELD), BLOCKS_SENT)
        storage.kv.normal_(generator=torch.Generator(device).manual_seed(seed))
        _synchronize(device)
        # What a CPU does in a thread can be had on a GPU, to be compared.
        return cls(device, storage, ids, SlotCopies(torch.device("cpu") if in_thread else device, "copy"))

    def slot(self, leg: Leg) -> torch.Tensor:
        """uint8 [leg_bytes]. Slots of a case are made when it begins, and those of the one before are dropped."""
        num_blocks, num_slots = CASES[leg.case]
        if leg.case not in self.slots:
            self.slots.clear()
            num_bytes = self.storage.leg_bytes(num_blocks, HEADS)
            self.slots[leg.case] = torch.zeros((num_slots, num_bytes), dtype=torch.uint8, device=self.device)
            _synchronize(self.device)
        return self.slots[leg.case][leg.number % num_slots]

    async def gather(self, leg: Leg) -> None:
        start_s = time.perf_counter()
        blocks, slot = leg.blocks(self.block_ids), self.slot(leg)
        await self.copies.run(lambda: self.storage.start_gather(blocks, 0, HEADS, slot, leg.tag))
        self.copying_s.append(time.perf_counter() - start_s)

    async def scatter(self, leg: Leg) -> None:
        start_s = time.perf_counter()
        blocks, slot = leg.blocks(self.block_ids), self.slot(leg)
        await self.copies.run(lambda: self.storage.start_scatter(blocks, 0, HEADS, slot, leg.tag))
        self.copying_s.append(time.perf_counter() - start_s)


async def open_connection(scheme: str, address: str, in_thread: bool) -> tuple[Connection, Side]:
    """The sending end: GPU 0."""
    side = Side.make(0, seed=7, in_thread=in_thread)
    endpoint = await open_endpoint(
        f"{scheme}://127.0.0.1:0", "sender", progress=Progress.POLLING, memory=_memory(side.device)
    )
    return await endpoint.connect(address, 60.0), side


async def send_side(scheme: str, address: str, in_thread: bool) -> None:
    """Sends what is granted: a tag a line on standard input."""
    connection, side = await open_connection(scheme, address, in_thread)
    loop = asyncio.get_running_loop()
    grants = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(grants), sys.stdin)
    print("ready", flush=True)
    busy: dict[int, asyncio.Task[None]] = {}  # by slot
    sending_s: list[float] = []

    async def send(leg: Leg, before: asyncio.Task[None] | None) -> None:
        if before is not None:
            await before
        await side.gather(leg)
        start_s = time.perf_counter()
        await connection.send(leg.tag, side.slot(leg))
        sending_s.append(time.perf_counter() - start_s)

    while line := await grants.readline():
        leg = Leg.of(int(line))
        slot = leg.number % CASES[leg.case][1]
        if leg.number == 0:
            await asyncio.gather(*busy.values())
        busy[slot] = asyncio.create_task(send(leg, busy.get(slot)))
    await asyncio.gather(*busy.values())
    print(
        f"sender: lane {connection.lane}  {_micros(side.copying_s)} a gather, {_micros(sending_s)} a send", flush=True
    )
    assert not ON_GPU or connection.lane in ("cuda_ipc", "nccl"), f"the bytes took {connection.lane}"
    await connection.close()


async def receive_side(scheme: str, num_rounds: int, in_thread: bool) -> None:
    side = Side.make(1 if ON_GPU else 0, seed=8, in_thread=in_thread)
    endpoint = await open_endpoint(
        f"{scheme}://127.0.0.1:0", "receiver", progress=Progress.POLLING, memory=_memory(side.device)
    )
    pipe = asyncio.subprocess.PIPE
    flags = ["--in-thread"] if in_thread else []
    argv = ["-m", "benchmarks.handoff", scheme, "--address", endpoint.address, *flags]
    child = await asyncio.create_subprocess_exec(sys.executable, *argv, stdin=pipe, stdout=pipe)
    assert child.stdin is not None
    assert child.stdout is not None
    assert await child.stdout.readline() == b"ready\n", "the sending process could not start"
    connection = await endpoint.wait_for_peer("sender", 60.0)
    for case, (num_blocks, num_slots) in enumerate(CASES):
        times = [
            await one_round(connection, side, child.stdin, case, round_) for round_ in range(NUM_WARMUP + num_rounds)
        ]
        if case == 0:
            check(side)
        num_bytes = BLOCKS_SENT * side.storage.leg_bytes(1, HEADS)
        rates = sorted(num_bytes / one / GB for one in times[NUM_WARMUP:])
        slot_mib = side.storage.leg_bytes(num_blocks, HEADS) / (1 << 20)
        print(
            f"{scheme}  {slot_mib:6.2f} MiB x {num_slots}  median {statistics.median(rates):7.2f} GB/s"
            f"  (worst {rates[0]:.2f}, best {rates[-1]:.2f})  lane {connection.lane}"
            f"  {_micros(side.copying_s)} a scatter",
            flush=True,
        )
        side.copying_s.clear()
    child.stdin.close()
    print((await child.stdout.read()).decode(), end="", flush=True)
    assert await child.wait() == 0, "the sending process failed"
    assert not ON_GPU or connection.lane in ("cuda_ipc", "nccl"), f"the bytes took {connection.lane}"
    await connection.close()
    await endpoint.close()


async def one_round(connection: Connection, side: Side, grants: asyncio.StreamWriter, case: int, round_: int) -> float:
    """Seconds from the first grant to the last block."""
    num_blocks, num_slots = CASES[case]
    num_legs = BLOCKS_SENT // num_blocks

    async def fill(slot: int) -> None:
        for number in range(slot, num_legs, num_slots):
            leg = Leg(case, round_, number)
            posted = connection.post_receive(leg.tag, side.slot(leg))
            grants.write(f"{leg.tag}\n".encode())
            await posted.wait()
            await side.scatter(leg)

    side.slot(Leg(case, round_, 0))
    begin = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for slot in range(num_slots):
            tasks.create_task(fill(slot))
    return time.perf_counter() - begin


def check(side: Side) -> None:
    """Every block is its source's, all others are as they were, and a damaged leg changes nothing."""
    source = torch.empty_like(side.storage.kv).normal_(generator=torch.Generator(side.device).manual_seed(7))
    source_ids = random.Random(1).sample(range(BLOCKS_HELD), BLOCKS_SENT)
    assert torch.equal(side.storage.kv[:, side.block_ids], source[:, source_ids]), "a block differs from its source"
    untouched = sorted(set(range(BLOCKS_HELD)) - set(side.block_ids))
    before = source.normal_(generator=torch.Generator(side.device).manual_seed(8))
    assert torch.equal(side.storage.kv[:, untouched], before[:, untouched]), "a block was written that was not sent"
    leg = Leg(0, NUM_WARMUP, 0)
    slot = side.slot(leg).clone()
    side.storage.gather(leg.blocks(side.block_ids), 0, HEADS, slot, leg.tag)
    slot[HEADER_BYTES + slot.numel() // 2] ^= 1
    _synchronize(side.device)
    before.copy_(side.storage.kv)
    try:
        side.storage.scatter(leg.blocks(side.block_ids), 0, HEADS, slot, leg.tag)
    except DigestMismatch:
        assert torch.equal(before, side.storage.kv), "a damaged leg reached a block"
        print("checked: all blocks arrived, and a damaged leg was refused", flush=True)
        return
    raise AssertionError("a damaged leg was accepted")


def host_cost(num_rounds: int = 200, num_warmup: int = 10) -> None:
    """Microseconds of host time, of slots of 64 MiB: every start finds the device idle, as the loop's watch would."""
    device = torch.device("cuda", 0)
    kernels = cast(KernelBackend, importlib.import_module("common.kernels.triton_backend"))
    storage = KVStorage(16, 64, 8, 64, 128, torch.bfloat16, device, kernels)
    storage.kv.normal_()
    ids = random.Random(1).sample(range(64), 16)
    slot = torch.zeros(storage.leg_bytes(len(ids), 8), dtype=torch.uint8, device=device)
    _synchronize(device)
    for name, start in (("start_gather", storage.start_gather), ("start_scatter", storage.start_scatter)):
        times = []
        for _ in range(num_warmup + num_rounds):
            begin_s = time.perf_counter()
            work = start(ids, 0, 8, slot, 5)
            times.append(time.perf_counter() - begin_s)
            work.wait()
            work.result()
        times = sorted(times[num_warmup:])
        print(f"{name}: median {_micros(times)}, 9 of 10 within {times[len(times) * 9 // 10] * 1e6:.0f} µs", flush=True)


def _micros(times: list[float]) -> str:
    return f"{statistics.median(times) * 1e6:.0f} µs" if times else "-"


def _memory(device: torch.device) -> str:
    return str(device) if device.type == "cuda" else "host"


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scheme", choices=("ucx", "nccl", "host-cost"))
    parser.add_argument("num_rounds", type=int, nargs="?", default=10)
    parser.add_argument("--address", help="of the receiving end: be the sending end")
    parser.add_argument("--in-thread", action="store_true", help="launch copies in a thread instead of on the loop")
    arguments = parser.parse_args()
    if arguments.scheme == "host-cost":
        host_cost()
    elif arguments.address is None:
        asyncio.run(receive_side(arguments.scheme, arguments.num_rounds, arguments.in_thread))
    else:
        asyncio.run(send_side(arguments.scheme, arguments.address, arguments.in_thread))


if __name__ == "__main__":
    main()
