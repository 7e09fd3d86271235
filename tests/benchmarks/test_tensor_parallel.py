"""The tensor-parallel benchmark's whole way on two CPU ranks, and what it decides."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.tensor_parallel import CHECK, OUT_OF_MEMORY, Jobs
from benchmarks.tensor_parallel_engine import blocks_of, fitting, per_replay
from benchmarks.tensor_parallel_rank import is_out_of_memory


def rehearse(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.tensor_parallel", "--rehearse", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=380.0, check=False, env=environment)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_two_ranks_choose_what_one_chooses_and_their_steps_are_timed(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    done = rehearse("--shapes", "llama-3.1-8b", "--batches", "2", "--steps", "4", "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "both ranks chose the 87 tokens" in done.stdout
    assert "| 2 | 100 |" in done.stdout
    assert "| step ms | max | graph alone |" in done.stdout  # of two steps there is no p99
    (timing,) = map(json.loads, out.read_text().splitlines())
    assert (timing["shape"], timing["batch"]) == ("llama-3.1-8b", 2)
    assert 0 < timing["median_ms"] <= timing["p99_ms"]
    assert set(timing["rates"]) == {"read", "copy"}


def test_a_phase_that_takes_too_long_ends_everything_with_a_traceback() -> None:
    done = rehearse("--phase-limit", "0.2")
    assert done.returncode == 1
    assert "tensor_parallel_rank.py" in done.stderr.partition("(most recent call first):")[2]
    assert f"FAILED, job: exit status of a rank: {{'{CHECK}': {-signal.SIGALRM}}}" in done.stderr


@pytest.mark.parametrize(
    ("wanted", "free_bytes", "fit"),
    [
        ([1, 32], 320, [1, 32]),
        ([1, 32], 319, [1, 16]),
        ([16, 32], 200, [16]),
        ([1, 32], 30, [1, 2]),
        ([4, 32], 9, []),
        ([4], -5, []),
    ],
)
def test_a_batch_that_does_not_fit_is_halved(wanted: list[int], free_bytes: int, fit: list[int]) -> None:
    assert fitting(wanted, 10, free_bytes) == fit


@pytest.mark.parametrize(("context", "num_steps", "num_blocks"), [(2048, 60, 33), (2048, 0, 33), (54, 0, 1)])
def test_a_row_has_blocks_for_every_token_of_a_run(context: int, num_steps: int, num_blocks: int) -> None:
    assert blocks_of(context, num_steps) == num_blocks


def test_the_first_replay_does_not_count() -> None:
    events = [("sum", 10.0 * n, 1e6 if n < 2 else 3.0) for n in (5, 4, 3, 2, 1, 0)]
    events += [("mm", 10.0 * n + 1, 50.0) for n in range(3)]
    assert per_replay(events, 3) == [("mm", 1, 50.0), ("sum", 2, 6.0)]


@pytest.mark.parametrize(
    ("statuses", "tried", "status"),
    [
        ([0], [[1, 8]], 0),
        ([OUT_OF_MEMORY, OUT_OF_MEMORY, 0], [[1, 8], [1, 4], [1, 2]], 0),
        ([OUT_OF_MEMORY] * 4, [[1, 8], [1, 4], [1, 2], [1]], OUT_OF_MEMORY),
        ([1], [[1, 8]], 1),
    ],
)
def test_out_of_memory_is_tried_again_with_less(
    statuses: list[int], tried: list[list[int]], status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def run(self: Jobs, job: str, batches: list[int]) -> int:
        seen.append(list(batches))
        return statuses[len(seen) - 1]

    monkeypatch.setattr(Jobs, "run", run)
    assert Jobs.run_shape(object.__new__(Jobs), "llama-3.1-8b", (1, 8)) == status
    assert seen == tried


@pytest.mark.parametrize(
    ("error", "is_it"),
    [
        (torch.OutOfMemoryError("no batch fits"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("we are out of memory cards"), False),
    ],
)
def test_an_error_for_want_of_memory_is_known_by_what_it_says(error: Exception, is_it: bool) -> None:
    assert is_out_of_memory(error) is is_it


def test_an_error_that_ends_a_capture_is_known_by_what_it_came_from() -> None:
    try:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
    except RuntimeError as error:
        ended = error
    assert is_out_of_memory(ended)
    ended.__context__ = ended  # a circle ends
    assert not is_out_of_memory(ended)
