"""Throughput and host time of one connection between two processes: `python -m benchmarks.transport [ucx|nccl]`.

From GPU 0 to GPU 1 where there are two, else over host memory. A round is a go-ahead and so many messages, some of them
in flight at once; the bytes of every round are compared before its rate is believed. It is run with the rests that the
event loop took formerly and with those of now, alone and beside a thread that holds the interpreter: half of the time
in short bites, or for as long as the launches of a step take. It knows nothing of KV blocks.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import threading
import time
from dataclasses import asdict, dataclass

import torch

from common.short_sleep import Patience, WatchCounts, loop_watch
from common.transport.base import Connection, Endpoint
from common.transport.registry import open_endpoint
from common.transport.ucx_worker import Progress

ON_GPU = torch.cuda.device_count() >= 2
UNIT = 1 << 20 if ON_GPU else 1 << 16  # "1" below; host memory is slow
CASES = [  # (units in a message, in flight, messages in a round)
    (1, 1, 1),
    *((units, depth, 32) for units in (1, 16) for depth in (1, 2, 4)),
    (64, 2, 2),
    *((64, depth, 16) for depth in (1, 2, 4)),
]
PATIENCE = {
    "former": Patience(eager_s=0.0, breath_s=20e-6, share=0.0, longest_s=0.0),  # 20 µs whenever nothing moves
    "now": Patience(),
}
BESIDE = {"alone": None, "beside short bites": (50e-6, 50e-6), "beside launches": (2e-3, 4e-3)}  # (holds, rests) in s
SECTIONS = [(name, beside) for beside in BESIDE for name in PATIENCE]
NUM_ROUNDS = 12
NUM_WARMUP = 3
ALONE_S = 0.3  # for which the other thread is watched before anything is sent


@dataclass(frozen=True, slots=True)
class Round:
    """Both ends go through the same rounds."""

    section: int
    case: int
    number: int

    def tag(self, index: int) -> int:
        return self.section << 48 | self.case << 40 | self.number << 16 | index

    @property
    def go_tag(self) -> int:
        return self.tag(0xFFFF)

    def value(self, index: int) -> int:
        """Of every byte of a message: none of the messages of the round before has it in the same place."""
        return 1 + (self.number * 37 + index * 5) % 255


class BusyThread:
    """Holds the interpreter for a while, rests, and counts. Every process has one; it waits until `set`."""

    def __init__(self) -> None:
        self.num_bites = 0
        self._times_s: tuple[float, float] | None = None
        self._on = threading.Event()
        threading.Thread(target=self._run, name="busy", daemon=True).start()

    async def set(self, beside: str) -> float:
        """Bites per second while nothing is sent; 0 if there are none."""
        self._times_s = BESIDE[beside]
        if self._times_s is None:
            self._on.clear()
            return 0.0
        self._on.set()
        await asyncio.sleep(0.05)
        before, start_s = self.num_bites, time.perf_counter()
        await asyncio.sleep(ALONE_S)
        return (self.num_bites - before) / (time.perf_counter() - start_s)

    def _run(self) -> None:
        while self._on.wait():
            hold_s, rest_s = self._times_s or (0.0, 0.0)
            end_s = time.perf_counter() + hold_s
            while time.perf_counter() < end_s:
                pass
            self.num_bites += 1
            time.sleep(rest_s)


@dataclass(slots=True)
class Tally:
    """What the rounds of one case took at one end."""

    seconds: float = 0.0
    thread_s: float = 0.0  # of the event loop's thread on a processor
    num_bites: int = 0
    num_turns: int = 0
    num_rests: int = 0
    looking_s: float = 0.0
    resting_s: float = 0.0

    def line(self, num_messages: int, alone_per_s: float) -> str:
        per = 1e6 / num_messages
        rest_us = self.resting_s / self.num_rests * 1e6 if self.num_rests else 0.0
        text = (
            f"{self.num_turns / num_messages:6.1f} turns {self.looking_s * per:6.1f} us, "
            f"{self.num_rests / num_messages:5.1f} rests of {rest_us:5.1f} us, cpu {self.thread_s * per:6.1f} us"
        )
        if alone_per_s:
            text += f", thread {self.num_bites / self.seconds / alone_per_s:4.0%}"
        return text


class Meter:
    """Adds what happens between `start` and `stop` to a tally."""

    def __init__(self, busy: BusyThread) -> None:
        self.tally = Tally()
        self._busy = busy

    def start(self) -> None:
        loop_watch().counts = WatchCounts()
        self._began = time.perf_counter(), time.thread_time(), self._busy.num_bites

    def stop(self) -> float:
        """Seconds since the start."""
        start_s, start_thread_s, start_bites = self._began
        elapsed_s, counts, tally = time.perf_counter() - start_s, loop_watch().counts, self.tally
        tally.seconds += elapsed_s
        tally.thread_s += time.thread_time() - start_thread_s
        tally.num_bites += self._busy.num_bites - start_bites
        tally.num_turns += counts.num_turns
        tally.num_rests += counts.num_rests
        tally.looking_s += counts.looking_s
        tally.resting_s += counts.resting_s
        return elapsed_s


async def open_end(scheme: str, progress: str, name: str, device: torch.device) -> Endpoint:
    memory = str(device) if device.type == "cuda" else "host"
    return await open_endpoint(f"{scheme}://127.0.0.1:0", name, progress=Progress(progress), memory=memory)


async def send_side(scheme: str, progress: str, address: str) -> None:
    """Prints a line when it is ready for a section, and a tally after each of its cases."""
    device, busy = device_of(0), BusyThread()
    endpoint = await open_end(scheme, progress, "sender", device)
    connection = await endpoint.connect(address, 60.0)
    for section, (patience, beside) in enumerate(SECTIONS):
        loop_watch().patience = PATIENCE[patience]
        rounds = [Round(section, case, i) for case in range(len(CASES)) for i in range(NUM_ROUNDS + NUM_WARMUP)]
        go_aheads = {one: connection.post_receive(one.go_tag, filled(1, 1, 0, device)[0]) for one in rounds}
        print(json.dumps(await busy.set(beside)), flush=True)
        for case, (units, depth, num_messages) in enumerate(CASES):
            buffers, meter = filled(num_messages, units * UNIT, 0, device), Meter(busy)
            for one in (one for one in rounds if one.case == case):
                for i in range(num_messages):
                    buffers[i].fill_(one.value(i))
                synchronize(device)
                await go_aheads[one].wait()
                meter.start()
                await send_all(connection, one, buffers, depth)
                meter.stop()
            print(json.dumps(asdict(meter.tally)), flush=True)
    await connection.drained()
    await endpoint.close()


async def send_all(connection: Connection, one: Round, buffers: torch.Tensor, depth: int) -> None:
    """buffers: uint8 [num_messages, num_bytes], `depth` of them in flight at once."""
    left = iter(range(buffers.shape[0]))

    async def send_some() -> None:
        for i in left:
            await connection.send(one.tag(i), buffers[i])

    await asyncio.gather(*(send_some() for _ in range(depth)))


async def receive_side(scheme: str, progress: str) -> None:
    device, busy = device_of(1), BusyThread()
    endpoint = await open_end(scheme, progress, "receiver", device)
    options = ("--address", endpoint.address, "--switch-interval", str(sys.getswitchinterval()))
    arguments = ("-m", "benchmarks.transport", scheme, progress, *options)
    child = await asyncio.create_subprocess_exec(sys.executable, *arguments, stdout=asyncio.subprocess.PIPE)
    connection = await endpoint.wait_for_peer("sender", 60.0)
    for section, (patience, beside) in enumerate(SECTIONS):
        loop_watch().patience = PATIENCE[patience]
        there_per_s = float(await told(child))
        here_per_s = await busy.set(beside)
        print(f"{scheme}, lane {connection.lane}, rests: {patience}, {beside}")
        for case, (units, depth, num_messages) in enumerate(CASES):
            buffers, meter = filled(num_messages, units * UNIT, 0, device), Meter(busy)
            rounds = [Round(section, case, i) for i in range(NUM_ROUNDS + NUM_WARMUP)]
            times_s = [await receive_all(connection, one, buffers, meter) for one in rounds][NUM_WARMUP:]
            there = Tally(**json.loads(await told(child)))
            round_s, num_measured = statistics.median(times_s), num_messages * len(rounds)
            print(
                f"{units * UNIT >> 10:6d} KiB x {depth} of {num_messages:2d}  "
                f"{buffers.numel() / round_s / 1e9:7.2f} GB/s {round_s / num_messages * 1e6:8.1f} us a message"
                f" | receiver {meter.tally.line(num_measured, here_per_s)}"
                f" | sender {there.line(num_measured, there_per_s)}",
                flush=True,
            )
    await connection.close()
    await child.wait()
    await endpoint.close()


async def told(child: asyncio.subprocess.Process) -> bytes:
    assert child.stdout is not None
    line = await child.stdout.readline()
    assert line, "the sending process failed"
    return line


async def receive_all(connection: Connection, one: Round, buffers: torch.Tensor, meter: Meter) -> float:
    """Seconds from the go-ahead to the last byte. buffers: uint8 [num_messages, num_bytes]"""
    receives = [connection.post_receive(one.tag(i), buffers[i]) for i in range(buffers.shape[0])]
    go_ahead = filled(1, 1, 1, buffers.device)[0]
    meter.start()
    await connection.send(one.go_tag, go_ahead)
    for receive in receives:
        await receive.wait()
    elapsed_s = meter.stop()
    for i in range(buffers.shape[0]):
        assert bool((buffers[i] == one.value(i)).all()), "not the bytes that were sent"
    return elapsed_s


def filled(num_messages: int, num_bytes: int, value: int, device: torch.device) -> torch.Tensor:
    """uint8 [num_messages, num_bytes], written before this returns."""
    buffers = torch.full((num_messages, num_bytes), value, dtype=torch.uint8, device=device)
    synchronize(device)
    return buffers


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_of(index: int) -> torch.device:
    return torch.device("cuda", index) if ON_GPU else torch.device("cpu")


def main() -> None:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scheme", choices=("ucx", "nccl"), nargs="?", default="ucx")
    parser.add_argument("progress", nargs="?", default="polling")
    parser.add_argument("--switch-interval", type=float, default=sys.getswitchinterval(), help="of the interpreter, s")
    parser.add_argument("--address", help="of the receiving end: be the sending end")
    arguments = parser.parse_args()
    sys.setswitchinterval(arguments.switch_interval)
    if arguments.address is None:
        asyncio.run(receive_side(arguments.scheme, arguments.progress))
    else:
        asyncio.run(send_side(arguments.scheme, arguments.progress, arguments.address))


if __name__ == "__main__":
    main()
