"""What finds no memory is left out of the engine's benchmark and said; the rest is timed."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from benchmarks.engine import MAX_BLOCKS, chosen_cases, time_decode, time_prefill
from benchmarks.engine_steps import Bench, blocks_for
from benchmarks.random_model import random_decoder
from benchmarks.tensor_parallel_engine import KERNELS, small_config
from common.worker.device_runner import DeviceRunner
from common.worker.device_step import DeviceStep
from common.worker.step_plan import StepPlan

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(scope="module")
def bench() -> Bench:
    torch.set_num_threads(1)
    config = dataclasses.replace(small_config(rehearses=True), num_layers=1, windows=(None,), vocab_size=257)
    decoder = random_decoder(config, DEVICE, torch.float32, KERNELS)
    return Bench(decoder, max_blocks=6, max_rows=3, sizes=(1,))


@pytest.mark.gpu
@pytest.mark.slow
def test_decode_cases_that_find_too_few_blocks_are_left_out(bench: Bench, capsys: pytest.CaptureFixture[str]) -> None:
    (timing,) = time_decode(bench, [(40, 1), (300, 2)], num_steps=4)
    assert (timing.context, timing.batch) == (40, 1)
    assert 0 < timing.median_ms <= timing.p99_ms
    assert "LEFT OUT: context 300, batch 2 needs 10 of 6 blocks" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.slow
def test_prefill_that_runs_out_of_memory_is_left_out_and_the_next_one_is_timed(
    bench: Bench, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch = DeviceRunner.launch

    def launch_small(self: DeviceRunner, plan: StepPlan) -> DeviceStep:
        if sum(segment.num_tokens for segment in plan.segments) > 32:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nand so on")
        return launch(self, plan)

    monkeypatch.setattr(DeviceRunner, "launch", launch_small)
    (timing,) = time_prefill(bench, [(3, 20, 64), (7, 60, 64), (2, 20, 32)])
    assert (timing.num_prompts, timing.num_tokens, timing.chunk) == (2, 20, 32)
    said = capsys.readouterr().out
    assert "LEFT OUT: 3 × 20 in steps of 64: CUDA out of memory. Tried to allocate 20.00 GiB.\n" in said
    assert "LEFT OUT: 7 × 60 in steps of 64 needs 7 of 6 blocks" in said


def test_the_default_blocks_are_enough_for_every_case() -> None:
    cases = chosen_cases(None, rehearses=False, max_blocks=MAX_BLOCKS)
    assert max(blocks_for(batch, context + 70) for context, batch in cases.decode) <= cases.max_blocks
    assert max(blocks_for(prompts, tokens) for prompts, tokens, _ in cases.prefill) <= cases.max_blocks
    assert {(1, 32768, 2048), (32, 2048, 2048)} <= set(cases.prefill)
    assert (cases.max_rows, cases.sizes[-1]) == (256, 256)


def test_only_one_kind_of_steps_captures_nothing_for_the_other() -> None:
    prefill, decode = (chosen_cases(only, rehearses=False, max_blocks=9) for only in ("prefill", "decode"))
    assert (prefill.decode, prefill.sizes, prefill.max_rows, prefill.max_blocks) == ([], (), 32, 9)
    assert (decode.prefill, decode.max_rows) == ([], 256)
