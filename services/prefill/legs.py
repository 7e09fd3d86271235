"""The legs of a chunk: who sends which heads to whom, from which place in its send slot. Pure.

send slot of a rank:  | leg to the first decode rank | leg to the next | ... | unused |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.v1 import kv_pb2

from common.errors import TransferError
from common.kvcache.layout import KVLayout, Leg, heads_of_rank, plan_legs
from common.transport.pair_secret import pair_secret


@dataclass(frozen=True, slots=True)
class DecodeRank:
    """Where it is, and the secret by which it knows our ranks."""

    address: str
    secret: bytes


def decode_ranks(key: bytes, handoff_address: str, rank_addresses: Sequence[str]) -> list[DecodeRank]:
    """The decode ranks of a ticket; see `pair_secret`."""
    return [DecodeRank(address, pair_secret(key, handoff_address, address)) for address in rank_addresses]


@dataclass(frozen=True, slots=True)
class RankLeg:
    """One leg of a chunk: what `rank` gathers into [offset, offset + num_bytes) of its slot and sends."""

    rank: int
    peer: DecodeRank
    offset: int
    num_bytes: int
    tag: int
    first_local_head: int
    num_heads: int


class ChunkLegs:
    """The same for all chunks of a hand-off. Raises `InvalidArgument` if the two tensor-parallel sizes do not fit."""

    def __init__(self, layout: KVLayout, tp_size: int, ranks: Sequence[DecodeRank]) -> None:
        self._layout = layout
        self._tp_size = tp_size
        self._ranks = ranks
        self._legs = plan_legs(layout.num_kv_heads, tp_size, len(ranks))

    @property
    def connections(self) -> list[tuple[int, DecodeRank]]:
        """Each rank that sends, with each decode rank that it sends to."""
        pairs = sorted({(leg.prefill_rank, leg.decode_rank) for leg in self._legs})
        return [(rank, self._ranks[peer]) for rank, peer in pairs]

    @property
    def layer_block_bytes(self) -> int:
        """What one layer of one block takes on the wire, over all legs, without headers."""
        return self._layout.layer_block_bytes(sum(leg.num_heads for leg in self._legs))

    def max_layer_blocks(self, slot_bytes: int) -> int:
        """Blocks times layers of which all legs of each rank fit into its slot."""
        capacities = []
        for rank in {leg.prefill_rank for leg in self._legs}:
            own = [leg for leg in self._legs if leg.prefill_rank == rank]
            # A head that several decode ranks hold is gathered once for each of them.
            num_heads = sum(leg.num_heads for leg in own)
            capacities.append(self._layout.max_layer_blocks_per_slot(slot_bytes, num_heads, len(own)))
        return min(capacities)

    def pack(self, num_blocks: int, num_layers: int, granted: Sequence[kv_pb2.LegGrant]) -> list[RankLeg]:
        """The legs of a grant, each in its place.

        Raises `TransferError` if they are not the expected ones: a rank must never be told to send what is not there.
        """
        if len(granted) != len(self._legs):
            raise TransferError(f"the grant has other legs than the layout says: {len(granted)} of {len(self._legs)}")
        legs = [Leg(leg.prefill_rank, leg.decode_rank, leg.first_head, leg.num_heads) for leg in granted]
        sizes = [self._layout.leg_bytes(num_blocks, num_layers, leg.num_heads) for leg in granted]
        if sorted(legs, key=_order) != sorted(self._legs, key=_order) or sizes != [leg.num_bytes for leg in granted]:
            raise TransferError("the grant has other legs than the layout says")
        ends = [0] * self._tp_size
        packed = []
        for leg in granted:
            rank = leg.prefill_rank
            packed.append(self._place(leg, ends[rank]))
            ends[rank] += leg.num_bytes
        return packed

    def _place(self, leg: kv_pb2.LegGrant, offset: int) -> RankLeg:
        first_own_head = heads_of_rank(self._layout.num_kv_heads, self._tp_size, leg.prefill_rank).start
        return RankLeg(
            rank=leg.prefill_rank,
            peer=self._ranks[leg.decode_rank],
            offset=offset,
            num_bytes=leg.num_bytes,
            tag=leg.tag,
            first_local_head=leg.first_head - first_own_head,
            num_heads=leg.num_heads,
        )


def _order(leg: Leg) -> tuple[int, int]:
    return leg.decode_rank, leg.first_head
