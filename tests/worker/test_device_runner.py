"""The GPU's runner against the CPU's on the same plans: captured decode steps, mixed steps, sampling on the device."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.kernels import cuda_backend
from common.kvcache.storage import KVStorage
from common.models import decoder as decoder_module
from common.models.decoder import Decoder
from common.sampling.params import SamplingParams
from common.sampling.sampler import BatchSampler
from common.worker.device_runner import DeviceRunner
from common.worker.model_runner import ModelRunner, Runner
from common.worker.step_plan import AddRow, SampledToken, Segment, StepPlan
from tests.models.paged_run import BLOCK_SIZE, load_decoder, new_storage, random_tokens
from tests.models.tiny_checkpoints import VOCAB_SIZE, write_tiny_checkpoint

NUM_BLOCKS, MAX_ROWS = 48, 6
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
GREEDY = SamplingParams(max_tokens=100, seed=0, temperature=0.0)
DRAWN = SamplingParams(max_tokens=100, seed=(1 << 63) + 77, choice=2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_tiny_checkpoint("qwen3", tmp_path_factory.mktemp("model"), seed=11)


@pytest.fixture
def runners(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[Runner]:
    """The CPU's runner with the reference kernels, then the GPU's with Triton's."""
    reference = load_decoder(checkpoint)
    storage = new_storage(reference, NUM_BLOCKS)
    model_runner = ModelRunner(reference, storage, BatchSampler(VOCAB_SIZE, MAX_ROWS), MAX_ROWS)
    monkeypatch.setattr(decoder_module, "kernels_for", lambda device: cuda_backend)
    decoder = Decoder.load(checkpoint, reference.config, torch.float32, DEVICE, reference._group)
    shape = decoder.config
    storage = KVStorage(
        shape.num_layers, NUM_BLOCKS, shape.num_kv_heads, BLOCK_SIZE, shape.head_dim, torch.float32, DEVICE
    )
    return [model_runner, DeviceRunner(decoder, storage, MAX_ROWS, graph_sizes=(1, 2, 4))]


class Script:
    """Gives the same messages to all runners and returns what they agree on."""

    def __init__(self, runners: list[Runner]) -> None:
        self._runners = runners
        self._free = random_tokens(4 * NUM_BLOCKS, NUM_BLOCKS, seed=1)
        self._free = [*dict.fromkeys([*self._free, *range(NUM_BLOCKS)])]
        self._tables: dict[int, list[int]] = {}
        self._ends: dict[int, int] = {}
        self._step_id = 0

    def add(self, row: int, sampling: SamplingParams, outputs: list[int] | None = None, prompt: int = 9) -> None:
        for runner in self._runners:
            runner.add_row(AddRow(row, sampling, random_tokens(prompt, VOCAB_SIZE, seed=row), outputs or []))
        self._tables[row], self._ends[row] = [], 0

    def remove(self, row: int) -> None:
        for runner in self._runners:
            runner.remove_row(row)
        self._free += self._tables.pop(row)

    def segment(self, row: int, num_tokens: int = 0, output_index: int = 0, sample: bool = True) -> Segment:
        """A chunk of the prompt, or without `num_tokens` the token sampled last."""
        position = self._ends[row]
        self._ends[row] += max(1, num_tokens)
        new: list[int] = []
        while (len(self._tables[row]) + len(new)) * BLOCK_SIZE < self._ends[row]:
            new.append(self._free.pop())
        self._tables[row] += new
        token_ids = random_tokens(num_tokens, VOCAB_SIZE, seed=row + position) if num_tokens else None
        return Segment(row, token_ids, position, new, sample, output_index)

    def run(self, *segments: Segment) -> list[SampledToken]:
        self._step_id += 1
        plan = StepPlan(self._step_id, list(segments))
        first, *others = [runner.launch(plan).result() for runner in self._runners]
        for other in others:
            assert [(t.row, t.token_id, t.error) for t in other.sampled] == [
                (t.row, t.token_id, t.error) for t in first.sampled
            ]
            assert other.compute_ns > 0
        return others[0].sampled


def test_rows_join_and_leave_between_captured_steps(runners: list[Runner]) -> None:
    script = Script(runners)
    for row in (0, 3, 5):
        script.add(row, GREEDY if row else DRAWN)
        script.run(script.segment(row, 12 + row))
    for index in (1, 2):
        script.run(*(script.segment(row, output_index=index) for row in (5, 0, 3)))
    script.remove(3)
    for index in range(3, 8):  # over the end of a block
        script.run(*(script.segment(row, output_index=index) for row in (0, 5)))
    script.add(3, DRAWN)
    script.run(script.segment(3, 40), script.segment(5, output_index=8))
    script.run(*(script.segment(row, output_index=9) for row in (0, 3, 5)))


def test_a_sequence_handed_over_brings_all_its_blocks_with_its_first_step(runners: list[Runner]) -> None:
    script = Script(runners)
    script.add(2, GREEDY)
    script.run(script.segment(2, 50, sample=False))
    script.remove(2)
    script.add(4, GREEDY, outputs=[7])
    script.run(script.segment(4, 33, sample=False))
    script.run(script.segment(4, output_index=1))
    script.run(script.segment(4, output_index=2))


def test_more_rows_than_the_largest_graph_run_all_the_same(runners: list[Runner]) -> None:
    script = Script(runners)
    for row in range(MAX_ROWS):
        script.add(row, GREEDY, outputs=[row + 2])
    assert len(script.run(*(script.segment(row, output_index=1) for row in range(MAX_ROWS)))) == MAX_ROWS


@pytest.mark.parametrize(
    "sampling",
    [
        replace(DRAWN, temperature=0.8),
        replace(DRAWN, top_k=5, temperature=2.0),
        replace(DRAWN, top_p=0.7, temperature=1.3),
        replace(DRAWN, top_k=50, top_p=0.9, min_p=0.02),
        replace(DRAWN, presence_penalty=0.5, logit_bias=((5, 4.0),)),
        replace(GREEDY, min_tokens=4, stop_token_ids=(100, 295)),
    ],
    ids=["temperature", "top-k", "top-p", "all cutoffs", "penalty and bias", "min_tokens"],
)
def test_rows_draw_on_the_device_what_they_draw_on_the_host(runners: list[Runner], sampling: SamplingParams) -> None:
    script = Script(runners)
    script.add(1, sampling)
    script.add(2, GREEDY)
    script.run(script.segment(1, 21), script.segment(2, 5))
    for index in range(1, 6):
        script.run(script.segment(2, output_index=index), script.segment(1, output_index=index))


def test_logprobs_come_from_the_device_with_their_token(runners: list[Runner]) -> None:
    script = Script(runners)
    script.add(0, replace(DRAWN, logprobs=3))
    script.add(1, GREEDY)
    script.run(script.segment(0, 8), script.segment(1, 8))
    plain, detailed = script.run(script.segment(1, output_index=1), script.segment(0, output_index=1))
    assert (plain.logprob, plain.top_logprobs) == (None, None)
    assert detailed.logprob is not None
    assert detailed.top_logprobs is not None
    assert len(detailed.top_logprobs) == 3


def test_a_bad_segment_gets_an_error_and_the_others_run(runners: list[Runner]) -> None:
    script = Script(runners)
    script.add(0, GREEDY, outputs=[9])
    script.add(1, GREEDY, outputs=[9])
    sampled = script.run(
        script.segment(0, output_index=1), Segment(1, None, 0, [], True, 1), Segment(2, None, 0, [3], True, 1)
    )
    assert [bool(token.error) for token in sampled] == [False, True, True]


def test_warming_up_leaves_no_trace_in_what_follows(runners: list[Runner]) -> None:
    device_runner = runners[1]
    assert isinstance(device_runner, DeviceRunner)
    device_runner.warm_up(30)
    script = Script(runners)
    script.add(0, DRAWN)
    script.run(script.segment(0, 25))
    script.run(script.segment(0, output_index=1))


def test_a_launched_step_feeds_the_next_before_it_is_read(runners: list[Runner]) -> None:
    script = Script(runners)
    script.add(0, GREEDY)
    segments = [script.segment(0, 14), script.segment(0, output_index=1), script.segment(0, output_index=2)]
    tokens = []
    for runner in runners:
        pending = [runner.launch(StepPlan(step, [segment])) for step, segment in enumerate(segments)]
        tokens.append([step.result().sampled[0].token_id for step in pending])
    assert tokens[0] == tokens[1]
