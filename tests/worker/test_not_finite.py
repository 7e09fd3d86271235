"""A row whose numbers overflow, wherever in its prompt, fails on all ranks, and nobody else does."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from common.kvcache.storage import KVStorage
from common.parallel.group import TensorParallelGroup
from common.sampling.sampler import BatchSampler
from common.worker import mixed_graphs
from common.worker.device_runner import DeviceRunner
from common.worker.model_runner import ModelRunner
from common.worker.step_plan import NO_TOKEN, NOT_FINITE, AddRow, SampledToken, Segment, StepPlan, pack_tokens
from tests.models.paged_run import load_decoder, new_storage, random_tokens
from tests.models.tiny_checkpoints import VOCAB_SIZE
from tests.parallel.in_process_group import run_ranks
from tests.worker.runner_script import GREEDY, NUM_BLOCKS, Script, device_parts, reference_runner
from tests.worker.spoiled_checkpoints import FAULTS, INFINITE_EMBEDDING, INFINITE_KEY, write_spoiled_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # the interpreter's numpy
BAD_ROW, GOOD_ROW, MAX_ROWS = 2, 0, 4
BAD = random_tokens(10, VOCAB_SIZE, seed=BAD_ROW)[5]  # in the middle of what `Script` gives this row
BLOCKS = range(4)


@pytest.fixture(params=FAULTS)
def fault(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def outcomes(sampled: Iterable[SampledToken]) -> list[tuple[int, str]]:
    return [(token.row, token.error) for token in sampled]


class Rank:
    """The CPU's runner, and a prompt that is given in chunks."""

    def __init__(self, path: Path, dtype: torch.dtype, group: TensorParallelGroup | None = None) -> None:
        decoder = load_decoder(path, group, dtype)
        self.storage: KVStorage = new_storage(decoder, 2 * len(BLOCKS))
        self._runner = ModelRunner(decoder, self.storage, BatchSampler(VOCAB_SIZE, 2), 2)

    def run(self, prompt: list[int], neighbour: list[int], num_chunks: int) -> list[list[tuple[int, str, int]]]:
        """Row, error and token of all answers to a step, for each chunk of `prompt`; the neighbour is whole in one."""
        for row, tokens in enumerate((prompt, neighbour)):
            self._runner.add_row(AddRow(row, GREEDY, pack_tokens(tokens), b""))
        size = -(-len(prompt) // num_chunks)
        found = []
        for start in range(0, len(prompt), size):
            is_last = start + size >= len(prompt)
            blocks = [] if start else list(BLOCKS)
            segments = [Segment(0, pack_tokens(prompt[start : start + size]), start, blocks, is_last, 0)]
            if is_last:
                blocks = [len(BLOCKS) + block for block in BLOCKS]
                segments.append(Segment(1, pack_tokens(neighbour), 0, blocks, True, 0))
            result = self._runner.run(StepPlan(start, segments))
            assert result.num_not_finite == sum(bool(token.error) for token in result.sampled)
            found.append([(token.row, token.error, token.token_id) for token in result.sampled])
        for row in range(2):
            self._runner.remove_row(row)
        return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("num_chunks", [1, 3])
def test_a_prompt_that_overflows_in_its_middle_fails_with_its_chunk(
    num_chunks: int, dtype: torch.dtype, fault: str, tmp_path: Path
) -> None:
    good = [token for token in random_tokens(31, VOCAB_SIZE, seed=4) if token != BAD]
    rank = Rank(write_spoiled_checkpoint(tmp_path, BAD, fault, dtype), dtype)
    (*_, ((_, _, first_token), (_, _, second_token))) = rank.run(good, good[::-1], num_chunks)
    bad = [*good[:15], BAD, *good[16:]]
    found = rank.run(bad, good[::-1], num_chunks)
    assert [(row, error) for step in found for row, error, _ in step if error] == [(0, NOT_FINITE)]
    assert found[num_chunks // 2][0] == (0, NOT_FINITE, -1), "the chunk with the token, also if it samples nothing"
    assert found[-1][-1] == (1, "", second_token)
    assert rank.storage.kv.isfinite().all()
    assert rank.run(good, good[::-1], num_chunks)[-1] == [(0, "", first_token), (1, "", second_token)]


@pytest.mark.parametrize("num_chunks", [1, 3])
def test_every_rank_learns_what_overflowed_on_one(num_chunks: int, fault: str, tmp_path: Path) -> None:
    path = write_spoiled_checkpoint(tmp_path / "model", BAD, fault)
    good = [token for token in random_tokens(31, VOCAB_SIZE, seed=4) if token != BAD]
    bad = [*good[:15], BAD, *good[16:]]

    def body(group: TensorParallelGroup) -> list[list[tuple[int, str, int]]]:
        return Rank(path, torch.float32, group).run(bad, good, num_chunks)

    alone = Rank(path, torch.float32).run(bad, good, num_chunks)
    assert alone[num_chunks // 2][0] == (0, NOT_FINITE, -1)
    assert run_ranks(2, tmp_path / "store", body) == [alone, alone]


@pytest.mark.parametrize("token_id", [VOCAB_SIZE // 2 - 1, VOCAB_SIZE // 2])
def test_an_embedding_that_is_infinite_spoils_no_token_of_another_rank(token_id: int, tmp_path: Path) -> None:
    """The ends of a rank's part of the vocabulary are what it looks up for tokens that are not its own."""
    path = write_spoiled_checkpoint(tmp_path / "model", token_id, INFINITE_EMBEDDING)
    good = [token for token in random_tokens(20, VOCAB_SIZE, seed=4) if token != token_id]

    def body(group: TensorParallelGroup) -> list[list[tuple[int, str, int]]]:
        return Rank(path, torch.float32, group).run(good, good, 1)

    alone = Rank(path, torch.float32).run(good, good, 1)
    assert [error for _, error, _ in alone[0]] == ["", ""]
    assert run_ranks(2, tmp_path / "store", body) == [alone, alone]


def make_script(
    path: Path, monkeypatch: pytest.MonkeyPatch, chunk_tokens: int = 0, graph_sizes: tuple[int, ...] = (2, 4)
) -> tuple[Script, list[KVStorage]]:
    """Both runners, the GPU's with steps captured as asked for; and their blocks."""
    torch.set_num_threads(1)
    monkeypatch.setattr(mixed_graphs, "_MIN_TOKENS", 16)
    monkeypatch.setattr(mixed_graphs, "_ROWS", (2,))
    model_runner, expected = reference_runner(path, MAX_ROWS)
    decoder, storage = device_parts(path, monkeypatch)
    runner = DeviceRunner(decoder, storage, MAX_ROWS, graph_sizes=graph_sizes, chunk_tokens=chunk_tokens)
    return Script([model_runner, runner]), [expected, storage]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize(
    ("chunk_tokens", "fault"), [(0, INFINITE_KEY), (16, INFINITE_EMBEDDING)], ids=["kernel by kernel", "captured"]
)
def test_chunks_on_a_gpu_fail_as_on_a_cpu(
    chunk_tokens: int, fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_spoiled_checkpoint(tmp_path, BAD, fault)
    script, storages = make_script(path, monkeypatch, chunk_tokens)
    script.add(GOOD_ROW, GREEDY, outputs=[5])
    script.add(BAD_ROW, GREEDY)
    found = script.run(script.segment(GOOD_ROW, output_index=1), script.segment(BAD_ROW, 10, sample=False))
    assert outcomes(found) == [(GOOD_ROW, ""), (BAD_ROW, NOT_FINITE)]
    script.remove(BAD_ROW)
    script.add(BAD_ROW, GREEDY)
    script.add(1, GREEDY)  # whose blocks, and the flags, are as if the other had not been
    found = script.run(script.segment(BAD_ROW, 10), script.segment(1, 6), script.segment(GOOD_ROW, output_index=2))
    assert outcomes(found) == [(BAD_ROW, NOT_FINITE), (1, ""), (GOOD_ROW, "")]
    assert all(bool(storage.kv.isfinite().all()) for storage in storages)


@pytest.mark.gpu
def test_a_captured_decode_step_fails_the_row_whose_token_overflows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, storages = make_script(write_spoiled_checkpoint(tmp_path, BAD, INFINITE_KEY), monkeypatch)
    for row, token_id in ((GOOD_ROW, 5), (BAD_ROW, BAD), (3, 6)):
        script.add(row, GREEDY, outputs=[token_id])
    rows = (GOOD_ROW, BAD_ROW, 3)
    found = script.run(*(script.segment(row, output_index=1) for row in rows))
    assert outcomes(found) == [(GOOD_ROW, ""), (BAD_ROW, NO_TOKEN), (3, "")]
    assert found[1].not_finite
    # The row that failed may be in the next step already, with a token that stands for none.
    found = script.run(*(script.segment(row, output_index=2) for row in rows))
    assert outcomes(found) == [(GOOD_ROW, ""), (BAD_ROW, ""), (3, "")]
    assert all(bool(storage.kv.isfinite().all()) for storage in storages)


def test_a_key_that_overflows_is_told_by_no_logit(tmp_path: Path) -> None:
    """What `INFINITE_KEY` is for: without a note of what was cleaned the prompt would get a plausible token."""
    decoder = load_decoder(write_spoiled_checkpoint(tmp_path, BAD, INFINITE_KEY))
    storage = new_storage(decoder, NUM_BLOCKS)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder.kernels, "spoil_cleaned", lambda rows, plan: None)
        runner = ModelRunner(decoder, storage, BatchSampler(VOCAB_SIZE, 1), 1)
        runner.add_row(AddRow(0, GREEDY, pack_tokens([5, BAD, 6]), b""))
        result = runner.run(StepPlan(0, [Segment(0, pack_tokens([5, BAD, 6]), 0, [0], True, 0)]))
    assert outcomes(result.sampled) == [(0, "")]
