"""Legs of a chunk: packed without a gap or an overlap, and nothing that the layout does not say."""

from __future__ import annotations

import pytest
from baton.v1 import kv_pb2
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidArgument, TransferError
from common.kvcache.layout import KVLayout, heads_of_rank, plan_legs
from services.prefill.legs import ChunkLegs, DecodeRank, decode_ranks

SIZES = st.sampled_from([1, 2, 4, 8, 16])


def make_layout(num_kv_heads: int) -> KVLayout:
    return KVLayout(num_layers=3, num_kv_heads=num_kv_heads, head_dim=4, block_size=2, dtype="bfloat16")


def grant(
    layout: KVLayout, prefill_tp: int, decode_tp: int, num_blocks: int, num_layers: int = 1
) -> list[kv_pb2.LegGrant]:
    return [
        kv_pb2.LegGrant(
            prefill_rank=leg.prefill_rank,
            decode_rank=leg.decode_rank,
            first_head=leg.first_head,
            num_heads=leg.num_heads,
            tag=index,
            num_bytes=layout.leg_bytes(num_blocks, num_layers, leg.num_heads),
        )
        for index, leg in enumerate(plan_legs(layout.num_kv_heads, prefill_tp, decode_tp))
    ]


def peers(decode_tp: int) -> list[DecodeRank]:
    return decode_ranks(b"key", "decode:1", [f"decode-{rank}" for rank in range(decode_tp)])


@settings(deadline=None, max_examples=60)
@given(num_kv_heads=st.sampled_from([1, 2, 4, 8]), prefill_tp=SIZES, decode_tp=SIZES, spare_bytes=st.integers(0, 5000))
def test_largest_chunk_fills_no_slot_beyond_its_end(
    num_kv_heads: int, prefill_tp: int, decode_tp: int, spare_bytes: int
) -> None:
    layout = make_layout(num_kv_heads)
    legs = ChunkLegs(layout, prefill_tp, peers(decode_tp))
    slot_bytes = spare_bytes + layout.block_bytes(num_kv_heads) * 16 + 64 * 16
    num_blocks = legs.max_layer_blocks(slot_bytes)  # of one layer
    assert num_blocks >= 1
    ends = [0] * prefill_tp
    for leg in legs.pack(num_blocks, 1, grant(layout, prefill_tp, decode_tp, num_blocks)):
        assert leg.offset == ends[leg.rank]
        ends[leg.rank] += leg.num_bytes
        assert leg.first_local_head >= 0
        assert leg.first_local_head + leg.num_heads <= len(heads_of_rank(num_kv_heads, prefill_tp, leg.rank))
        assert (leg.rank, leg.peer) in legs.connections
    assert max(ends) <= slot_bytes
    larger = grant(layout, prefill_tp, decode_tp, num_blocks + 1)
    assert max(sum(leg.num_bytes for leg in larger if leg.prefill_rank == rank) for rank in range(prefill_tp)) > (
        slot_bytes
    )


def test_sizes_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(InvalidArgument):
        ChunkLegs(make_layout(4), 2, peers(3))


def test_missing_leg_is_refused() -> None:
    layout = make_layout(4)
    legs = ChunkLegs(layout, 2, peers(2))
    with pytest.raises(TransferError):
        legs.pack(2, 1, grant(layout, 2, 2, 2)[:1])


@pytest.mark.parametrize(("num_blocks", "num_layers"), [(3, 1), (2, 2)])
def test_grant_for_another_number_of_blocks_or_layers_is_refused(num_blocks: int, num_layers: int) -> None:
    layout = make_layout(4)
    with pytest.raises(TransferError):
        ChunkLegs(layout, 1, peers(1)).pack(2, 1, grant(layout, 1, 1, num_blocks, num_layers))
