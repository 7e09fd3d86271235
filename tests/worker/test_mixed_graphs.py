"""Captured steps with chunks of prompts against the CPU's runner: same tokens, same K and V, nothing else written."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common.kvcache.storage import KVStorage
from common.sampling.params import SamplingParams
from common.worker import mixed_graphs, rank_runtime
from common.worker.device_runner import DeviceRunner
from common.worker.mixed_step import MAX_CHUNKS, MixedSize
from common.worker.rank_messages import StartRank
from common.worker.step_plan import Segment
from tests.models.paged_run import BLOCK_SIZE
from tests.models.tiny_checkpoints import write_tiny_checkpoint
from tests.worker.runner_script import DRAWN, GREEDY, NUM_BLOCKS, Script, device_parts, reference_runner

MAX_ROWS, CHUNK_TOKENS = 10, 32
pytestmark = pytest.mark.gpu
Size = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Harness:
    """Both runners behind one script. `sizes`: (rows, tokens) of the captured steps so far."""

    script: Script
    storage: KVStorage
    expected: KVStorage
    sizes: list[Size]

    def run(self, *segments: Segment) -> None:
        """A step; compares tokens, what was stored, and that all else is what it was."""
        before = self.storage.kv.clone()
        written = torch.zeros(NUM_BLOCKS * BLOCK_SIZE, dtype=torch.bool)
        for segment in segments:
            table = self.script.table(segment.row)
            for position in range(segment.position, segment.position + segment.num_tokens):
                written[table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE] = True
        self.script.run(*segments)
        assert torch.equal(_slots(self.storage)[~written], _by_slot(before)[~written])
        torch.testing.assert_close(_slots(self.storage)[written], _slots(self.expected)[written], rtol=1e-3, atol=1e-4)


MakeHarness = Callable[..., Harness]


@pytest.fixture
def make_harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> MakeHarness:
    def make(family: str, prompts_alone: bool = False) -> Harness:
        torch.set_num_threads(1)
        # Small sizes: an interpreted step takes time for each token.
        monkeypatch.setattr(mixed_graphs, "_MIN_TOKENS", 16)
        monkeypatch.setattr(mixed_graphs, "_ROWS", (2, 8))
        checkpoint = write_tiny_checkpoint(family, tmp_path / family, seed=11)
        model_runner, expected = reference_runner(checkpoint, MAX_ROWS)
        decoder, storage = device_parts(checkpoint, monkeypatch)
        device_runner = DeviceRunner(
            decoder,
            storage,
            MAX_ROWS,
            graph_sizes=() if prompts_alone else (4,),
            chunk_tokens=CHUNK_TOKENS,
            prompts_alone=prompts_alone,
        )
        graphs = device_runner._mixed
        assert graphs is not None
        sizes: list[Size] = []
        run = graphs.run

        def noting(size: MixedSize, flat: object) -> object:
            sizes.append((size.num_rows, size.num_tokens))
            return run(size, flat)  # type: ignore[arg-type]

        monkeypatch.setattr(graphs, "run", noting)
        return Harness(Script([model_runner, device_runner]), storage, expected, sizes)

    return make


def _by_slot(kv: torch.Tensor) -> torch.Tensor:
    """[layers, blocks, 2, heads, block size, head size] → [slots, everything else], on the host."""
    return kv.permute(1, 4, 0, 2, 3, 5).reshape(NUM_BLOCKS * BLOCK_SIZE, -1).cpu()


def _slots(storage: KVStorage) -> torch.Tensor:
    return _by_slot(storage.kv)


@dataclass(slots=True)
class Sequence:
    """What is left of a prompt, and how many tokens were sampled."""

    num_prompt: int
    num_sampled: int = 0


@pytest.mark.slow
@pytest.mark.parametrize(("family", "seed"), [("qwen3", 1), ("mistral_window", 2)])
def test_rows_join_and_leave_and_chunks_have_any_length(make_harness: MakeHarness, family: str, seed: int) -> None:
    """Steps as a front makes them: all that decode, in any order, and chunks within the budget."""
    harness = make_harness(family)
    rng = random.Random(seed)
    live: dict[int, Sequence] = {}
    for _ in range(15):
        for row in rng.sample(sorted(live), len(live)):
            if live[row].num_sampled > 5 and rng.random() < 0.4:
                harness.script.remove(row)
                del live[row]
        if len(live) < 7 and rng.random() < 0.7:
            row = rng.choice([row for row in range(MAX_ROWS) if row not in live])
            sampling: SamplingParams = rng.choice([GREEDY, DRAWN])
            harness.script.add(row, sampling)
            live[row] = Sequence(rng.choice([1, 2, 17, 60]))
        segments, budget = [], rng.choice([5, 20, CHUNK_TOKENS])
        for row in rng.sample(sorted(live), len(live)):
            sequence = live[row]
            if sequence.num_prompt == 0:
                segments.append(harness.script.segment(row, output_index=sequence.num_sampled))
                sequence.num_sampled += 1
            elif budget:
                count = min(budget, sequence.num_prompt)
                sequence.num_prompt -= count
                budget -= count
                ends = sequence.num_prompt == 0
                segments.append(harness.script.segment(row, count, 0, sample=ends))
                sequence.num_sampled += int(ends)
        if segments:
            harness.run(*segments)
    assert len(harness.sizes) >= 8
    assert {tokens for _, tokens in harness.sizes} == {16, 32}
    assert len({rows for rows, _ in harness.sizes} - {0}) >= 2


def test_prompts_run_without_rows_that_decode_and_beside_more_than_the_smallest_graph(
    make_harness: MakeHarness,
) -> None:
    harness = make_harness("qwen3")
    harness.script.add(9, DRAWN)
    harness.run(harness.script.segment(9, 30))
    for row in range(8):
        harness.script.add(row, GREEDY, outputs=[row + 2])
    decoding = [harness.script.segment(row, output_index=1) for row in range(8)]
    harness.script.add(8, GREEDY)
    harness.run(*decoding, harness.script.segment(8, 7, sample=False), harness.script.segment(9, output_index=1))
    harness.run(harness.script.segment(8, 16), *(harness.script.segment(row, output_index=2) for row in (3, 9)))
    harness.run(harness.script.segment(0, output_index=2))  # what it sat out left it its last token
    assert harness.sizes == [(0, 32), (10, 16), (2, 16)]


@pytest.mark.parametrize("family", ["qwen3", "mistral_window"])
def test_short_steps_of_prompts_alone(make_harness: MakeHarness, family: str) -> None:
    """As in a prefill worker: what is longer, and what a prompt has left of a long one, in any order."""
    harness = make_harness(family, prompts_alone=True)
    for row, sampling in enumerate((GREEDY, DRAWN, GREEDY)):
        harness.script.add(row, sampling)
    harness.run(harness.script.segment(0, CHUNK_TOKENS + 1, sample=False))  # too long
    harness.run(harness.script.segment(0, 20), harness.script.segment(1, 5, sample=False))
    harness.run(harness.script.segment(2, 3), harness.script.segment(1, 8))
    harness.script.remove(0)
    harness.script.add(0, GREEDY)
    harness.run(harness.script.segment(0, 1))
    harness.run(harness.script.segment(2, output_index=1))  # a row that decodes, which prefill workers have not
    assert harness.sizes == [(0, 32), (0, 16), (0, 16)]


def test_steps_beyond_the_captured_run_kernel_by_kernel(make_harness: MakeHarness) -> None:
    harness = make_harness("qwen3")
    for row in range(MAX_CHUNKS + 1):
        harness.script.add(row, GREEDY)
    harness.run(*(harness.script.segment(row, 3) for row in range(MAX_CHUNKS + 1)))  # too many chunks
    harness.script.add(9, GREEDY)
    harness.run(harness.script.segment(9, CHUNK_TOKENS + 1), harness.script.segment(0, output_index=1))  # too long
    assert harness.sizes == []
    harness.run(harness.script.segment(9, output_index=1), harness.script.segment(0, output_index=2))
    harness.run(*(harness.script.segment(row, 4, output_index=2) for row in range(MAX_CHUNKS)))
    assert harness.sizes == [(0, 32)]


def test_a_row_that_must_choose_anew_does_so_wherever_it_is_sampled(make_harness: MakeHarness) -> None:
    """Penalties and bias are applied after the graph: to the row's place among those that were sampled."""
    harness = make_harness("qwen3")
    biased = SamplingParams(max_tokens=100, seed=5, presence_penalty=0.9, logit_bias=((5, 6.0), (9, 6.5)))
    harness.script.add(0, GREEDY, outputs=[4])
    harness.script.add(1, GREEDY)
    harness.script.add(2, biased)
    harness.run(
        harness.script.segment(1, 12, sample=False),
        harness.script.segment(2, 9),
        harness.script.segment(0, output_index=1),
    )
    harness.run(
        harness.script.segment(1, 11),
        harness.script.segment(2, output_index=1),
        harness.script.segment(0, output_index=2),
    )
    assert harness.sizes == [(2, 32), (2, 16)]


def test_a_rank_captures_what_it_is_told_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, storage = device_parts(write_tiny_checkpoint("qwen3", tmp_path, seed=11), monkeypatch)
    for captures_steps, chunk_tokens, expected in (
        (True, 0, None),
        (True, 200, ((0, 2), (64, 128, 256))),
        (False, 0, None),
        (False, 200, ((0,), (64, 128, 192, 256))),
    ):
        start = StartRank(
            rank=0, tp_size=1, group_address="", model_dir="", device="cuda", dtype="auto", num_blocks=NUM_BLOCKS,
            block_size=BLOCK_SIZE, max_rows=2, max_step_tokens=3, num_slots=1, slot_bytes=1, transport_url="",
            transport_progress="", peer_name="", captures_steps=captures_steps, captured_chunk_tokens=chunk_tokens,
        )  # fmt: skip
        runner = rank_runtime._device_runner(decoder, storage, start, None)
        assert isinstance(runner, DeviceRunner)
        graphs = runner._mixed
        assert (None if graphs is None else (graphs._rows, graphs._tokens)) == expected
        assert (runner._graphs is not None) == captures_steps
