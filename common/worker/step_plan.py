"""What a front tells its ranks to compute, and what they answer. Pure values; every rank of a worker gets the same.

A rank has `max_rows` rows. A running sequence owns one row, on every rank, from `AddRow` to `RemoveRow`; the row keeps
the sequence's block table, its sampling state and the token sampled last, so that a plan only carries what is new.
Messages are applied in the order in which they were sent.

Token ids travel *packed*: unsigned 32-bit integers in this host's byte order, in one piece of bytes, as a prompt has
thousands of them and an integer object each would cost more than all else that a front does for it.
"""

from array import array
from collections.abc import Iterable

import msgspec

from common.sampling.params import SamplingParams

TOKEN_BYTES = 4  # of a packed token id


def pack_tokens(token_ids: Iterable[int]) -> bytes:
    """Raises `OverflowError` for an id that is no uint32."""
    return array("I", token_ids).tobytes()


def unpack_tokens(packed: bytes) -> "array[int]":
    """The ids again."""
    return array("I", packed)


class StepMessage(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Base of everything on the step channel; encoded as a msgpack array that starts with the class name."""


class AddRow(StepMessage, frozen=True, array_like=True, tag=True):
    """A sequence takes a row. Resets the row's block table and rebuilds its sampling state by replay.

    `output_token_ids` are the tokens generated so far; the last of them is the input of a segment without token ids.
    Both are packed.
    """

    row: int
    sampling: SamplingParams
    prompt_token_ids: bytes
    output_token_ids: bytes


class RemoveRow(StepMessage, frozen=True, array_like=True, tag=True):
    """The sequence leaves; the row may be given to another."""

    row: int


class Segment(msgspec.Struct, frozen=True, array_like=True):
    """Consecutive tokens of one row in one step.

    `token_ids`: the input tokens, packed, or None for the one token that the row sampled last (it stays on the device).
    `position`: absolute position of the first input token.
    `new_block_ids`: appended to the row's block table before the step; the table then covers every input token.
    `sample`: whether a token is sampled after the last input token.
    `output_index`: index, in the sequence's output, of the token that is sampled (the random numbers' counter).
    """

    row: int
    token_ids: bytes | None
    position: int
    new_block_ids: list[int]
    sample: bool
    output_index: int

    @property
    def decodes(self) -> bool:
        """Whether it is one decode step: its token is the one sampled last, and the next one is sampled."""
        return self.token_ids is None and self.sample

    @property
    def num_tokens(self) -> int:
        return 1 if self.token_ids is None else len(self.token_ids) // TOKEN_BYTES


class StepPlan(StepMessage, frozen=True, array_like=True, tag=True):
    """One forward pass over a ragged batch."""

    step_id: int
    segments: list[Segment]


class SampledToken(msgspec.Struct, frozen=True, array_like=True):
    """A token that a step sampled for a row.

    `logprob` and `top_logprobs` [(token id, logprob)] are set if the row's sampling parameters ask for them.
    `error`, if not empty, says why this row has no valid token (`token_id` is then -1); one that samples nothing may
    have an error too. `not_finite`: it is because of what the model computed for the row.
    """

    row: int
    token_id: int
    logprob: float | None = None
    top_logprobs: list[tuple[int, float]] | None = None
    error: str = ""
    not_finite: bool = False


class StepResult(StepMessage, frozen=True, array_like=True, tag=True):
    """Answer to a plan, in the order of its sampling segments. `compute_ns`: forward and sampling, wall clock."""

    step_id: int
    sampled: list[SampledToken]
    compute_ns: int

    @property
    def num_not_finite(self) -> int:
        return sum(token.not_finite for token in self.sampled)


NO_TOKEN = "no token can be chosen: the logits hold NaN or infinity, or every token is excluded"
NOT_FINITE = "the model's numbers for the prompt are not finite: some keys or values are NaN or infinity"


def no_token(row: int) -> SampledToken:
    """The answer to a row whose logits allow no choice."""
    return SampledToken(row, -1, error=NO_TOKEN, not_finite=True)


def not_finite(row: int) -> SampledToken:
    """The answer to a row of which the step stored zeros instead of what the model computed."""
    return SampledToken(row, -1, error=NOT_FINITE, not_finite=True)
