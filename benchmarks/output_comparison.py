"""Whether greedy outputs of the same prompts differ only where rounding decides. Pure.

Two ways to compute a prompt need not give the same bits: batches of other sizes sum in another order. Where the two
most probable tokens are nearly equal, greedy outputs may part then; both candidates are nearly equally probable in both
outputs at that place. After it they have nothing in common and are not compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOLERANCE = 0.1  # between logprobs that rounding alone sets apart


@dataclass(frozen=True, slots=True)
class Output:
    """One greedy output: its tokens, and at each of them the logprobs of the most probable tokens."""

    tokens: Sequence[int]
    logprobs: Sequence[Mapping[int, float]]

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.logprobs):
            raise ValueError(f"{len(self.tokens)} tokens with {len(self.logprobs)} positions of logprobs")


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two lists of outputs have in common."""

    num_equal: int  # outputs, in full
    num_outputs: int
    largest_margin: float  # between the candidates, where outputs part
    largest_drift: float  # of a chosen token's logprob before that: nothing is required of it
    faults: tuple[str, ...]  # differences that rounding does not explain

    def __str__(self) -> str:
        return (
            f"{self.num_equal} of {self.num_outputs} equal in full, others part at margins up to "
            f"{self.largest_margin:.4f}; the logprob of a token moves by up to {self.largest_drift:.4f}"
        )


def compare(outputs: Sequence[Output], others: Sequence[Output], tolerance: float = TOLERANCE) -> Comparison:
    """Raises `ValueError` unless both have the same number of outputs, each as long as the other's."""
    if not outputs or [len(one.tokens) for one in outputs] != [len(one.tokens) for one in others]:
        raise ValueError("these are not outputs of the same requests")
    margins, drifts, faults = [0.0], [0.0], []
    num_equal = 0
    for index, (own, other) in enumerate(zip(outputs, others, strict=True)):
        place = _first_difference(own.tokens, other.tokens)
        num_equal += place is None
        for token, ours, theirs in zip(own.tokens[:place], own.logprobs, other.logprobs, strict=False):
            drifts.append(abs(ours[token] - theirs[token]))
        if place is None:
            continue
        both = (_margin(own, other, place), _margin(other, own, place))
        margins += both
        if not all(margin <= tolerance for margin in both):  # so that NaN is a fault too
            candidates = f"{own.tokens[place]} and {other.tokens[place]}"
            apart = " and ".join(f"{margin:.4f}" for margin in both)
            faults.append(f"output {index}, token {place}: {candidates} are {apart} apart, limit {tolerance}")
    return Comparison(num_equal, len(outputs), max(margins), max(drifts), tuple(faults))


def _first_difference(tokens: Sequence[int], others: Sequence[int]) -> int | None:
    return next((place for place, (a, b) in enumerate(zip(tokens, others, strict=True)) if a != b), None)


def _margin(output: Output, other: Output, place: int) -> float:
    """How much more probable the output's own token is to it than the other's; infinite if that is not near the top."""
    logprobs = output.logprobs[place]
    return abs(logprobs[output.tokens[place]] - logprobs.get(other.tokens[place], float("-inf")))
