"""Step plans through the runner: tokens as transformers generates them, and rows that do not disturb each other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common.errors import InternalError
from common.kvcache.storage import KVStorage
from common.parallel.group import TensorParallelGroup
from common.sampling.params import SamplingParams
from common.sampling.sampler import BatchSampler
from common.worker.model_runner import ModelRunner
from common.worker.step_plan import AddRow, RemoveRow, SampledToken, Segment, StepPlan, pack_tokens
from tests.models.paged_run import BLOCK_SIZE, load_decoder, load_reference, new_storage, random_tokens
from tests.models.tiny_checkpoints import CONTEXT_LENGTH, VOCAB_SIZE, write_tiny_checkpoint
from tests.parallel.in_process_group import run_ranks

NUM_BLOCKS, MAX_ROWS = 40, 8


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_tiny_checkpoint("qwen3", tmp_path_factory.mktemp("model"), seed=11)


class Bench:
    """A runner with its storage, and the block tables that a front would keep."""

    def __init__(self, checkpoint: Path, group: TensorParallelGroup | None = None) -> None:
        decoder = load_decoder(checkpoint, group)
        self.storage: KVStorage = new_storage(decoder, NUM_BLOCKS)
        self.runner = ModelRunner(decoder, self.storage, BatchSampler(VOCAB_SIZE, MAX_ROWS), MAX_ROWS)
        self._free = list(range(NUM_BLOCKS))
        self.tables: dict[int, list[int]] = {}
        self._step_id = 0

    def add(
        self, row: int, prompt: list[int], outputs: list[int] | None = None, sampling: SamplingParams | None = None
    ) -> None:
        self.runner.add_row(AddRow(row, sampling or greedy(), pack_tokens(prompt), pack_tokens(outputs or [])))
        self.tables[row] = []

    def remove(self, row: int) -> None:
        self.runner.remove_row(RemoveRow(row).row)
        self._free = self.tables.pop(row) + self._free

    def grow(self, row: int, num_tokens: int) -> list[int]:
        """New blocks, taken from both ends in turn so that tables are not runs."""
        table = self.tables[row]
        new: list[int] = []
        while (len(table) + len(new)) * BLOCK_SIZE < num_tokens:
            new.append(self._free.pop(0 if len(new) % 2 else -1))
        table += new
        return new

    def segment(
        self, row: int, token_ids: list[int] | None, position: int, sample: bool = True, output_index: int = 0
    ) -> Segment:
        end = position + (1 if token_ids is None else len(token_ids))
        packed = None if token_ids is None else pack_tokens(token_ids)
        return Segment(row, packed, position, self.grow(row, end), sample, output_index)

    def run(self, *segments: Segment) -> list[SampledToken]:
        self._step_id += 1
        result = self.runner.run(StepPlan(self._step_id, list(segments)))
        assert result.step_id == self._step_id
        assert result.compute_ns > 0
        return result.sampled

    def generate(self, row: int, prompt: list[int], num_tokens: int) -> list[int]:
        """Prefill in one chunk, then decode."""
        tokens = [self.run(self.segment(row, prompt, 0))[0].token_id]
        while len(tokens) < num_tokens:
            position = len(prompt) + len(tokens) - 1
            tokens.append(self.run(self.segment(row, None, position, output_index=len(tokens)))[0].token_id)
        return tokens


def greedy() -> SamplingParams:
    return SamplingParams(max_tokens=100, seed=0, temperature=0.0)


def drawn(seed: int, logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(max_tokens=100, seed=seed, temperature=1.0, logprobs=logprobs, presence_penalty=0.5)


def prompt_of(length: int) -> list[int]:
    return random_tokens(length, VOCAB_SIZE, seed=length)


def reference_tokens(checkpoint: Path, prompt: list[int], num_tokens: int) -> list[int]:
    output: torch.Tensor = load_reference(checkpoint).generate(
        torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens


def test_greedy_tokens_are_those_of_generate(checkpoint: Path) -> None:
    bench = Bench(checkpoint)
    bench.add(0, prompt_of(21))
    assert bench.generate(0, prompt_of(21), 30) == reference_tokens(checkpoint, prompt_of(21), 30)


def test_chunks_and_decode_steps_mix_in_one_batch(checkpoint: Path) -> None:
    bench = Bench(checkpoint)
    first, second = prompt_of(19), prompt_of(45)
    bench.add(2, first)
    bench.add(5, second)
    tokens = [bench.run(bench.segment(2, first, 0))[0].token_id]
    for start in (0, 20, 40):  # the second prompt's chunks ride along with the first one's decode steps
        chunk = bench.segment(5, second[start : start + 20], start, sample=start == 40)
        decode = bench.segment(2, None, 19 + len(tokens) - 1, output_index=len(tokens))
        sampled = bench.run(chunk, decode)
        tokens.append(sampled[-1].token_id)
    assert [token.row for token in sampled] == [5, 2]
    assert sampled[0].token_id == reference_tokens(checkpoint, second, 1)[0]
    assert tokens == reference_tokens(checkpoint, first, 4)


def test_a_sequence_goes_on_where_it_was_handed_over(checkpoint: Path) -> None:
    prompt = prompt_of(37)
    prefill, decode, whole = Bench(checkpoint), Bench(checkpoint), Bench(checkpoint)
    for bench in (prefill, whole):
        bench.add(1, prompt, sampling=drawn(3))
    expected = whole.generate(1, prompt, 12)
    tokens = [prefill.run(prefill.segment(1, prompt, 0))[0].token_id]
    decode.add(4, prompt, tokens, drawn(3))
    blocks = decode.grow(4, len(prompt))
    slot = torch.empty(1 << 20, dtype=torch.uint8)
    prefill.storage.gather(prefill.tables[1], 0, 2, slot, tag=9)
    decode.storage.scatter(blocks, 0, 2, slot, expected_tag=9)
    for index in range(1, 12):
        new = decode.grow(4, len(prompt) + index)
        segment = Segment(4, None, len(prompt) + index - 1, blocks + new if index == 1 else new, True, index)
        tokens.append(decode.run(segment)[0].token_id)
    assert tokens == expected


def test_a_draw_depends_on_its_place_in_the_output(checkpoint: Path) -> None:
    tokens: list[int] = []
    for index in range(8):
        bench = Bench(checkpoint)
        bench.add(0, prompt_of(6), sampling=drawn(5))
        tokens.append(bench.run(bench.segment(0, prompt_of(6), 0, output_index=index))[0].token_id)
    assert len(set(tokens)) > 1


def test_logprobs_come_with_the_token_they_belong_to(checkpoint: Path) -> None:
    bench = Bench(checkpoint)
    bench.add(0, prompt_of(9), sampling=drawn(1, logprobs=3))
    bench.add(1, prompt_of(12))
    long, short = bench.run(bench.segment(1, prompt_of(12), 0), bench.segment(0, prompt_of(9), 0))
    assert (long.row, long.logprob, long.top_logprobs) == (1, None, None)
    assert short.row == 0
    assert short.logprob is not None
    assert short.top_logprobs is not None
    assert len(short.top_logprobs) == 3
    assert short.top_logprobs[0][1] >= short.logprob


def test_a_bad_segment_gets_an_error_and_the_others_run(checkpoint: Path) -> None:
    bench = Bench(checkpoint)
    prompt = prompt_of(10)
    packed = pack_tokens(prompt)
    for row in range(7):
        bench.add(row, prompt)
    sampled = bench.run(
        Segment(0, packed, 0, [], True, 0),
        Segment(1, pack_tokens([VOCAB_SIZE]), 0, [3], True, 0),
        Segment(2, packed, 0, [NUM_BLOCKS], True, 0),
        Segment(3, None, 0, [4], True, 0),
        Segment(4, packed, CONTEXT_LENGTH - 5, list(range(32)), True, 0),
        Segment(7, packed, 0, [5], True, 0),
        Segment(5, b"", 0, [6], True, 0),
        Segment(6, packed, 0, [7], True, 0),
    )
    named = ["do not cover", "token id", "block id", "no token yet", "beyond", "no sequence", "0 tokens", ""]
    for token, part in zip(sampled, named, strict=True):
        assert part in token.error
    assert [token.token_id for token in sampled[:-1]] == [-1] * 7
    assert (sampled[-1].error, sampled[-1].token_id) == ("", reference_tokens(checkpoint, prompt, 1)[0])


def test_a_refused_segment_can_be_sent_again(checkpoint: Path) -> None:
    bench = Bench(checkpoint)
    prompt = prompt_of(10)
    bench.add(0, prompt)
    assert bench.run(Segment(0, pack_tokens([VOCAB_SIZE]), 0, [1], True, 0))[0].error
    assert "packed" in bench.run(Segment(0, pack_tokens(prompt) + b"?", 0, [1], True, 0))[0].error
    again = Segment(0, pack_tokens(prompt), 0, [1], True, 0)
    assert bench.run(again)[0].token_id == reference_tokens(checkpoint, prompt, 1)[0]


def test_a_row_starts_anew_for_its_next_sequence(checkpoint: Path) -> None:
    bench = Bench(checkpoint)
    bench.add(0, prompt_of(33))
    bench.generate(0, prompt_of(33), 5)
    bench.remove(0)
    bench.add(0, prompt_of(8))
    assert bench.generate(0, prompt_of(8), 5) == reference_tokens(checkpoint, prompt_of(8), 5)


def test_rows_are_taken_and_given_back_once(checkpoint: Path) -> None:
    bench = Bench(checkpoint)
    bench.add(0, prompt_of(3))
    with pytest.raises(InternalError, match="row 0 is taken"):
        bench.add(0, prompt_of(3))
    bench.remove(0)
    with pytest.raises(InternalError, match="row 0 is not taken"):
        bench.runner.remove_row(0)


def test_two_segments_for_one_row_are_refused(checkpoint: Path) -> None:
    bench = Bench(checkpoint)
    bench.add(0, prompt_of(3))
    with pytest.raises(InternalError, match="two segments"):
        bench.run(bench.segment(0, [5], 0), bench.segment(0, [6], 1))


def test_a_sequence_that_turns_to_nan_spoils_neither_its_neighbours_nor_its_blocks(tmp_path: Path) -> None:
    path = write_tiny_checkpoint("llama3", tmp_path, seed=1)
    tensors = load_file(path / "model.safetensors")
    tensors["model.embed_tokens.weight"][7] = float("nan")
    save_file(tensors, path / "model.safetensors")
    bench = Bench(path)
    prompt = [token for token in prompt_of(20) if token != 7]
    bench.add(0, prompt)
    bench.add(1, [7] * 40)
    sampled = bench.run(bench.segment(0, prompt, 0), bench.segment(1, [7] * 40, 0))
    assert sampled[0].token_id == reference_tokens(path, prompt, 1)[0]
    assert "NaN" in sampled[1].error
    bench.remove(0)
    bench.remove(1)
    bench.add(0, prompt)
    assert bench.generate(0, prompt, 3) == reference_tokens(path, prompt, 3)
    assert bench.storage.kv.isfinite().all()


def test_a_launched_step_feeds_the_next_before_it_is_read(checkpoint: Path) -> None:
    bench = Bench(checkpoint)
    prompt = prompt_of(14)
    bench.add(0, prompt)
    pending = [bench.runner.launch(StepPlan(0, [bench.segment(0, prompt, 0)]))]
    for index in (1, 2):
        plan = StepPlan(index, [bench.segment(0, None, 13 + index, output_index=index)])
        pending.append(bench.runner.launch(plan))
    tokens = [step.result().sampled[0].token_id for step in pending]
    assert tokens == reference_tokens(checkpoint, prompt, 3)


def test_every_rank_draws_the_same_tokens(checkpoint: Path, tmp_path: Path) -> None:
    def body(group: TensorParallelGroup) -> list[int]:
        bench = Bench(checkpoint, group)
        bench.add(0, prompt_of(11), sampling=drawn(8))
        return bench.generate(0, prompt_of(11), 10)

    first, second = run_ranks(2, tmp_path / "store", body)
    assert first == second == body(TensorParallelGroup.single())
