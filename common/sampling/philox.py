"""Random numbers as a function: one uniform per (seed, choice, position), with no state to carry around.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11. The
key is the 64-bit request seed (low word first); the counter is (position low, position high, choice, 0). A
uniform has 53 bits; its upper 24 bits are the first output word >> 8, so a float32 kernel draws the same
number, truncated. `uniform` is the reference in plain integers, `uniforms` the vectorised form; they agree
bit for bit.
"""

from __future__ import annotations

from typing import Final

import torch

_MASK: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS: Final = 10
_UNIT: Final = 2.0**-53

Words = tuple[int, int, int, int]


def philox4x32(counter: Words, key: tuple[int, int]) -> Words:
    """Ten rounds over four 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_NUM_ROUNDS):
        p0 = _MULTIPLIERS[0] * c0
        p1 = _MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32) ^ c3 ^ k1, p0 & _MASK
        k0 = (k0 + _WEYL[0]) & _MASK
        k1 = (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, choice: int, position: int) -> float:
    """The uniform in [0, 1) that chooses output token `position` (0 = the first) of sequence `choice`."""
    counter = (position & _MASK, position >> 32, choice, 0)
    w0, w1, _, _ = philox4x32(counter, (seed & _MASK, seed >> 32))
    return ((w0 >> 5 << 26) | (w1 >> 6)) * _UNIT


def as_signed(seed: int) -> int:
    """The int64 with the bit pattern of a uint64, as `uniforms` takes seeds."""
    return seed - (1 << 64) if seed >> 63 else seed


def uniforms(seeds: torch.Tensor, choices: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """`uniform` for each element.

    seeds: [n] int64, the bit pattern of a uint64. choices, positions: [n] int64, not negative.
    Returns [n] float64.
    """
    # Rows 0 and 1 of `even` are c0 and c2, those of `odd` c1 and c3: a round is then one multiplication.
    # An int64 product wraps, but its 64 bits are those of the unsigned product.
    even = torch.stack((positions & _MASK, choices))
    odd = torch.stack((positions >> 32, torch.zeros_like(choices)))
    key = torch.stack((seeds & _MASK, (seeds >> 32) & _MASK))
    rounds = torch.arange(_NUM_ROUNDS, device=seeds.device).view(-1, 1, 1)
    weyl = torch.tensor(_WEYL, device=seeds.device).view(1, 2, 1)
    keys = (key + rounds * weyl) & _MASK  # [rounds, 2, n]
    multipliers = torch.tensor(_MULTIPLIERS, device=seeds.device).view(2, 1)
    for round_key in keys:
        product = (even * multipliers).flip(0)
        even = ((product >> 32) & _MASK) ^ odd ^ round_key
        odd = product & _MASK
    bits = ((even[0] >> 5) << 26) | (odd[0] >> 6)
    return bits.to(torch.float64) * _UNIT
