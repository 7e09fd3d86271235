"""One rank's engine in a tensor-parallel group: the check against one rank, what fits, and decode steps to be timed.

Every rank runs the same code with the same plans; what one replays, all replay.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import gc
import signal
from collections.abc import Sequence
from typing import Final, cast

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.engine_check import _NUM_BLOCKS, _REFERENCE, _tokens
from benchmarks.engine_steps import Bench, DecodeTiming
from benchmarks.random_model import BLOCK_SIZE, random_decoder, random_storage, read_shape
from common.kernels import cuda_backend
from common.kernels.backend import KernelBackend
from common.models.config import ModelConfig
from common.models.decoder import Decoder
from common.parallel.group import TensorParallelGroup
from common.sampling.sampler import BatchSampler
from common.worker.device_runner import DeviceRunner
from common.worker.model_runner import ModelRunner

SIZE: Final = 2
GIB: Final = 1 << 30
KERNELS: Final = cast(KernelBackend, cuda_backend)  # on a CPU, interpreted
_PROFILED_REPLAYS: Final = 5
_MEETING_S: Final = 120.0  # also for NCCL's eager calls: a rank may still compile when another waits


class Rank:
    """A process's place in the group. A phase that takes too long ends the process by SIGALRM, with a traceback.

    By a signal, as its handler stops the thread that it shows: faulthandler's timer reads frames that still change, and
    that ended a process with SIGSEGV instead.
    """

    def __init__(self, rank: int, address: str, rehearses: bool, phase_limit_s: float) -> None:
        torch.set_num_threads(1)
        self.rank = rank
        self.rehearses = rehearses
        self._phase_limit_s = phase_limit_s
        self.device = torch.device("cpu") if rehearses else torch.device("cuda", rank)
        if not rehearses:
            torch.cuda.set_device(self.device)
        faulthandler.register(signal.SIGALRM, all_threads=False, chain=True)
        self.enter_phase()
        self.group = TensorParallelGroup.open(rank, SIZE, address, self.device, _MEETING_S)

    def enter_phase(self) -> None:
        """The last phase is over. A kernel that hangs cannot keep this limit from ending the process."""
        signal.setitimer(signal.ITIMER_REAL, self._phase_limit_s)

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)

    def told(self, values: Sequence[int]) -> list[list[int]]:
        """What every rank says, in rank order; nobody goes on before all have said it and the device is idle."""
        own = torch.tensor(values, dtype=torch.int64, device=self.device)
        return cast(list[list[int]], self.group.all_gather(own).tolist())

    def release(self) -> None:
        """Return unused memory to the device: graphs hold each other in cycles."""
        gc.collect()
        if not self.rehearses:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        """Of the device's memory, on the rank that has least."""
        self.release()
        own = 4 * GIB if self.rehearses else torch.cuda.mem_get_info(self.device)[0]
        return min(free for (free,) in self.told([own]))

    def close(self) -> None:
        """All graphs must be gone: NCCL waits for those that hold its kernels."""
        self.enter_phase()
        self.release()
        self.told([0])
        self.group.close()
        signal.setitimer(signal.ITIMER_REAL, 0.0)


def small_config(rehearses: bool) -> ModelConfig:
    """Like Llama, and with a vocabulary that the ranks cannot halve: the last one pads."""
    shape = read_shape("llama-3.1-8b", 2 if rehearses else 3)
    config = dataclasses.replace(shape, num_heads=8, num_kv_heads=2, vocab_size=2001)
    if rehearses:
        return dataclasses.replace(config, hidden_size=128, intermediate_size=192, head_dim=32, context_length=2048)
    return dataclasses.replace(config, hidden_size=512, intermediate_size=1024)


def same_tokens(rank: Rank) -> int:
    """How many tokens this rank chose in captured steps as plain torch does without other ranks. Raises if not."""
    config = small_config(rank.rehearses)
    alone = random_decoder(config, rank.device, torch.float32, _REFERENCE, seed=3)
    sampler = BatchSampler(config.vocab_size, 8, rank.device)
    expected = _tokens(ModelRunner(alone, random_storage(alone, _NUM_BLOCKS), sampler, 8))
    together = random_decoder(config, rank.device, torch.float32, KERNELS, seed=3, group=rank.group)
    runner = DeviceRunner(together, random_storage(together, _NUM_BLOCKS), 8, graph_sizes=(1, 2, 4, 8))
    chosen = _tokens(runner)
    if chosen != expected:
        raise AssertionError(f"rank {rank.rank} of {SIZE} chose {chosen}, one rank {expected}")
    return sum(map(len, chosen))


def blocks_of(context: int, num_steps: int) -> int:
    """Of one row in `Bench.decode`."""
    return -(-(context - num_steps // 2 + num_steps + 10) // BLOCK_SIZE)


def fitting(batches: Sequence[int], row_bytes: int, free_bytes: int) -> list[int]:
    """The batches whose blocks fit; one that does not is halved until it does. Ascending, each once."""
    fit = set()
    for wanted in batches:
        batch = wanted
        while batch and batch * row_bytes > free_bytes:
            batch //= 2
        fit.add(batch)
    return sorted(fit - {0})


def per_replay(events: Sequence[tuple[str, float, float]], num_replays: int) -> list[tuple[str, int, float]]:
    """(kernel, start, microseconds) of all replays → (kernel, calls, microseconds) of one, the most expensive first.

    The first replay does not count: in it a rank waits until the other has started its profiler.
    """
    calls: dict[str, list[tuple[float, float]]] = {}
    for name, start, us in events:
        calls.setdefault(name, []).append((start, us))
    rows = []
    for name, found in calls.items():
        num_calls = len(found) // num_replays
        counted = [us for _, us in sorted(found)[num_calls:]]
        rows.append((name, num_calls, sum(counted) / (num_replays - 1)))
    return sorted(rows, key=lambda row: row[2], reverse=True)


class RankBench(Bench):
    """The rank's part of the engine; every method must be called on all ranks."""

    def __init__(self, rank: Rank, decoder: Decoder, num_blocks: int, sizes: tuple[int, ...]) -> None:
        # Not that of `Bench`, which makes a model that no other rank shares.
        self.config, self.decoder, self.rank = decoder.config, decoder, rank
        self.storage = random_storage(decoder, num_blocks)
        self.runner = DeviceRunner(decoder, self.storage, sizes[-1], sizes)
        self.num_blocks = num_blocks
        self._step_id = 0
        # Of the embedding a step reads a row a token.
        embedding = 0 if self.config.tie_word_embeddings else len(decoder.shard.vocab) * self.config.hidden_size
        self._read_parameters = decoder.num_parameters - embedding

    def decode(self, context: int, batch: int, num_steps: int) -> DecodeTiming:
        """As of one rank; afterwards all ranks must have chosen the same tokens."""
        self.rank.told([batch])
        timing = super().decode(context, batch, num_steps)
        graphs = self.runner._graphs
        assert graphs is not None
        token_ids = graphs._steps[graphs.size_for(batch)].token_ids.tolist()
        others = self.rank.told(token_ids)
        if min(token_ids) < 0 or any(other != token_ids for other in others):
            raise AssertionError(f"the ranks chose different tokens, or none: {others}")
        return timing

    def top_kernels(self, context: int, batch: int, num_rows: int) -> list[tuple[str, int, float]]:
        """Of one captured step on this rank: (kernel, calls, microseconds in all), the most expensive first."""
        super().decode(context, batch, 12)  # the step that is replayed
        graphs = self.runner._graphs
        assert graphs is not None
        self.rank.told([0])
        with profile(activities=[ProfilerActivity.CUDA]) as recorded:
            for _ in range(_PROFILED_REPLAYS):
                graphs.run(graphs.size_for(batch))
            torch.cuda.synchronize()
        events = [(event.name, event.time_range.start, event.self_device_time_total) for event in recorded.events()]
        return per_replay(events, _PROFILED_REPLAYS)[:num_rows]
