"""The GPU's runner against the CPU's on the same plans: captured decode steps, mixed steps, sampling on the device."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from common.sampling.params import SamplingParams
from common.worker.device_runner import DeviceRunner
from common.worker.model_runner import Runner
from common.worker.step_marks import StepMarks
from common.worker.step_plan import AddRow, Segment, StepPlan, pack_tokens
from tests.models.tiny_checkpoints import write_tiny_checkpoint
from tests.worker.runner_script import DRAWN, GREEDY, Script, device_parts, reference_runner

MAX_ROWS = 6
pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_tiny_checkpoint("qwen3", tmp_path_factory.mktemp("model"), seed=11)


@pytest.fixture
def runners(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> list[Runner]:
    """The CPU's runner with the reference kernels, then the GPU's with Triton's."""
    model_runner, _ = reference_runner(checkpoint, MAX_ROWS)
    return [model_runner, DeviceRunner(*device_parts(checkpoint, monkeypatch), MAX_ROWS, graph_sizes=(1, 2, 4))]


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


async def test_warm_up_is_not_taken_for_the_first_step(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    marks = StepMarks(torch.device("cpu"))
    runner = DeviceRunner(*device_parts(checkpoint, monkeypatch), MAX_ROWS, graph_sizes=(), marks=marks)
    runner.warm_up(8)
    waiting = asyncio.create_task(marks.reached(0, 1))
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done(), "a chunk of the first plan would be sent before it is computed"
    runner.add_row(AddRow(0, GREEDY, pack_tokens([5]), b""))
    runner.launch(StepPlan(0, [Segment(0, pack_tokens([5, 6, 7]), 0, [0], True, 0)])).result()
    await waiting


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
