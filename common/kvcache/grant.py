"""Grants: the right to write one chunk of KV into staging slots, once.

    tag   63          32 31        16 15     8 7      0
          │    nonce    │ generation │  slot  │   leg  │

The tag is what the transport matches: a sender without a grant cannot name a slot, and one with a stale
grant matches nothing. Knows neither the transport nor gRPC.
"""

from __future__ import annotations

from dataclasses import dataclass

from common.errors import InvalidArgument

NONCE_BITS = 32
GENERATION_BITS = 16
SLOT_BITS = 8
LEG_BITS = 8
MAX_SLOTS = 1 << SLOT_BITS
MAX_LEGS = 1 << LEG_BITS
NUM_GENERATIONS = 1 << GENERATION_BITS


def make_tag(nonce: int, generation: int, slot: int, leg: int) -> int:
    """Pack the four fields into 64 bits, most significant first."""
    tag = 0
    for name, value, bits in (
        ("nonce", nonce, NONCE_BITS),
        ("generation", generation, GENERATION_BITS),
        ("slot", slot, SLOT_BITS),
        ("leg", leg, LEG_BITS),
    ):
        if not 0 <= value < 1 << bits:
            raise InvalidArgument(name, value, f"must fit in {bits} bits")
        tag = tag << bits | value
    return tag


@dataclass(frozen=True, slots=True)
class SlotHandle:
    """Ours: one use of a staging slot, on every rank of the decode worker."""

    slot: int
    generation: int
    nonce: int

    def tag(self, leg: int) -> int:
        """The tag of leg number `leg` of this use."""
        return make_tag(self.nonce, self.generation, self.slot, leg)
