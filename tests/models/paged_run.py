"""Runs a decoder over shuffled KV blocks chunk by chunk, as a worker would; for tests."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from common.kernels.batch import Span
from common.kvcache.storage import KVStorage
from common.models.config import read_model_config
from common.models.decoder import Decoder
from common.parallel.group import TensorParallelGroup

BLOCK_SIZE = 16
CPU = torch.device("cpu")


def load_decoder(path: Path, group: TensorParallelGroup | None = None, dtype: torch.dtype = torch.float32) -> Decoder:
    """The checkpoint on the CPU."""
    config = read_model_config(path)
    return Decoder.load(path, config, dtype, CPU, group or TensorParallelGroup.single())


def new_storage(decoder: Decoder, num_blocks: int) -> KVStorage:
    """Storage filled with noise, as blocks are after use by others."""
    config = decoder.config
    storage = KVStorage(
        config.num_layers, num_blocks, len(decoder.shard.kv_heads), BLOCK_SIZE, config.head_dim, decoder.dtype, CPU
    )
    storage.kv.normal_(generator=torch.Generator().manual_seed(7))
    return storage


def load_reference(path: Path) -> PreTrainedModel:
    """The same checkpoint as transformers runs it."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval()


@torch.inference_mode()
def reference_logprobs(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """[len(token_ids), vocab] float32."""
    logits: torch.Tensor = model(torch.tensor([token_ids])).logits[0]
    return logits.float().log_softmax(dim=-1)


@torch.inference_mode()
def paged_logprobs(
    decoder: Decoder, sequences: list[list[int]], steps: list[list[int]], seed: int
) -> list[torch.Tensor]:
    """Log-probabilities after every token of every sequence, [len(sequence), vocab] each.

    `steps[i][s]` is how many tokens of sequence s run in step i.
    """
    tables = shuffled_tables([len(sequence) for sequence in sequences], seed)
    storage = new_storage(decoder, sum(map(len, tables)))
    done = [0] * len(sequences)
    parts: list[list[torch.Tensor]] = [[] for _ in sequences]
    for step in steps:
        running = [(s, count) for s, count in enumerate(step) if count]
        spans = [Span(count, done[s] + count, tables[s]) for s, count in running]
        tokens = [token for s, count in running for token in sequences[s][done[s] : done[s] + count]]
        positions = [position for s, count in running for position in range(done[s], done[s] + count)]
        plan = decoder.kernels.plan_batch(
            spans, set(decoder.config.windows), storage.shape, decoder.dtype, decoder.device
        )
        hidden = decoder.forward(torch.tensor(tokens), torch.tensor(positions), plan, storage.kv)
        logprobs = decoder.logits(hidden).log_softmax(dim=-1)
        for (s, count), part in zip(running, torch.split(logprobs, [c for _, c in running]), strict=True):
            parts[s].append(part)
            done[s] += count
    assert done == [len(sequence) for sequence in sequences]
    return [torch.cat(part) for part in parts]


def shuffled_tables(lengths: list[int], seed: int) -> list[list[int]]:
    """A block table per sequence; together they use every block once, in random order."""
    counts = [-(-length // BLOCK_SIZE) for length in lengths]
    free = list(range(sum(counts)))
    random.Random(seed).shuffle(free)
    return [[free.pop() for _ in range(count)] for count in counts]


def random_tokens(length: int, vocab_size: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(2, vocab_size) for _ in range(length)]
