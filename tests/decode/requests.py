"""Sequences for tests, whose sampled tokens are a known function of seed and output index."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from common.sampling.params import SamplingParams
from common.worker.sequence import SequenceRequest

EOS = 0
VOCAB_SIZE = 7


def token_of(seed: int, output_index: int) -> int:
    """What a fake rank samples: the whole output of a sequence is known in advance."""
    return (seed * 7 + output_index * 13 + seed * output_index) % VOCAB_SIZE


def make_request(
    sequence_id: int,
    token_ids: Sequence[int],
    *,
    num_output: int = 0,
    max_tokens: int = 8,
    seed: int = 3,
    deadline_s: float = 1e9,
    eos: Sequence[int] = (EOS,),
) -> SequenceRequest:
    """A sequence whose last `num_output` tokens were generated before."""
    return SequenceRequest(
        request_id=f"request-{sequence_id}",
        sequence_id=sequence_id,
        token_ids=array("I", token_ids),
        num_prompt_tokens=len(token_ids) - num_output,
        sampling=SamplingParams(max_tokens=max_tokens, seed=seed, eos_token_ids=tuple(eos)),
        tenant="",
        deadline_s=deadline_s,
    )
