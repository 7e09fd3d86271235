"""That a request draws the same random numbers alone and in a batch: shown on logits that are equal by construction.

Over logits that are all zero the token is the uniform number times the vocabulary, rounded down, so it shows the number
itself; over others it must not depend on the batch either. On a GPU the sampler is that of captured steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import torch

from common.sampling.params import SamplingParams
from common.sampling.philox import uniform
from common.sampling.sampler import BatchSampler

SHOWN: Final = 6  # of what differs

Draw = Callable[[torch.Tensor, int], list[int]]  # (logits [n, vocab], output index) → tokens


def check_draws(
    device: torch.device, vocab_size: int, requests: Sequence[SamplingParams], batch: int, num_tokens: int
) -> int:
    """How many draws were compared, alone against `batch` at once. Raises `AssertionError` if one differs."""
    uneven = torch.randn((len(requests), vocab_size), generator=torch.Generator().manual_seed(5)).to(device) * 3
    flat = torch.zeros((batch, vocab_size), device=device)
    expected = [[int(uniform(r.seed, r.choice, at) * vocab_size) for at in range(num_tokens)] for r in requests]
    chosen = []
    for size in (1, batch):
        numbers, tokens = [], []
        for first in range(0, len(requests), size):
            members = requests[first : first + size]
            draw = _sampler(device, vocab_size, members)
            numbers.append([draw(flat[: len(members)], at) for at in range(num_tokens)])
            tokens.append([draw(uneven[first : first + size], at) for at in range(num_tokens)])
        if wrong := _differences(requests, _by_request(numbers), expected):
            raise AssertionError(
                f"in batches of {size} other random numbers were drawn than their counters say, {len(wrong)} of "
                f"{len(requests) * num_tokens}: {'; '.join(wrong[:SHOWN])}"
            )
        chosen.append(_by_request(tokens))
    if chosen[0] != chosen[1]:
        raise AssertionError("from equal logits a batch drew other tokens than its members alone")
    return len(requests) * num_tokens


def _differences(requests: Sequence[SamplingParams], tokens: list[list[int]], expected: list[list[int]]) -> list[str]:
    """What was drawn and what should have been."""
    return [
        f"request {number} (top-p {params.top_p:g}) at {at}: {token}, not {right}"
        for number, (params, own, others) in enumerate(zip(requests, tokens, expected, strict=True))
        for at, (token, right) in enumerate(zip(own, others, strict=True))
        if token != right
    ]


def _by_request(groups: list[list[list[int]]]) -> list[list[int]]:
    """[group][position][member] → [request][position]."""
    return [list(tokens) for group in groups for tokens in zip(*group, strict=True)]


def _sampler(device: torch.device, vocab_size: int, requests: Sequence[SamplingParams]) -> Draw:
    return (_device_sampler if device.type == "cuda" else _host_sampler)(device, vocab_size, requests)


def _host_sampler(device: torch.device, vocab_size: int, requests: Sequence[SamplingParams]) -> Draw:
    sampler = BatchSampler(vocab_size, len(requests), device)
    for row, params in enumerate(requests):
        sampler.add(row, params, [])

    def draw(logits: torch.Tensor, position: int) -> list[int]:
        output = sampler.sample(range(len(requests)), logits, [position] * len(requests))
        assert not output.invalid
        return [int(token_id) for token_id in output.token_ids]

    return draw


def _device_sampler(device: torch.device, vocab_size: int, requests: Sequence[SamplingParams]) -> Draw:
    from common.kernels.upload import overwrite
    from common.sampling.device_sampler import DeviceSampler

    sampler = DeviceSampler(vocab_size, len(requests), device)
    for row, params in enumerate(requests):
        overwrite(sampler.row_state[row], sampler.add(row, params, [], []))
    rows = torch.arange(len(requests), dtype=torch.int32, device=device)

    def draw(logits: torch.Tensor, position: int) -> list[int]:
        token_ids = torch.empty_like(rows)
        sampler.draw(logits, rows, torch.full_like(rows, position), token_ids)
        return [int(token_id) for token_id in token_ids.tolist()]

    return draw
