"""Layout: sizes, head ownership, and legs that bring every head exactly once, for all pairs of sizes."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidArgument, TransferError
from common.kvcache.layout import HEADER_BYTES, Coverage, KVLayout, Leg, heads_of_rank, plan_legs

LAYOUT = KVLayout(num_layers=3, num_kv_heads=8, head_dim=16, block_size=4, dtype="bfloat16")
SIZES = (1, 2, 4, 8)
ALL_PAIRS = list(product(SIZES, SIZES, SIZES))  # heads, prefill ranks, decode ranks


def test_a_block_holds_k_and_v_of_all_layers() -> None:
    assert LAYOUT.block_bytes(num_heads=2) == 3 * 2 * 2 * 4 * 16 * 2


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2), ("float16", 2), ("float8_e4m3fn", 1)])
def test_dtypes_have_their_size(dtype: str, itemsize: int) -> None:
    assert replace(LAYOUT, dtype=dtype).itemsize == itemsize


def test_a_leg_is_its_blocks_and_one_header() -> None:
    assert LAYOUT.leg_bytes(num_blocks=5, num_layers=3, num_heads=2) == 64 + 5 * LAYOUT.block_bytes(2)
    assert LAYOUT.leg_bytes(num_blocks=5, num_layers=1, num_heads=2) == 64 + 5 * LAYOUT.layer_block_bytes(2)


@settings(deadline=None, max_examples=100, derandomize=True, database=None)
@given(st.integers(0, 100_000), st.sampled_from([1, 2, 4, 8]), st.sampled_from([1, 2, 4, 8]))
def test_a_slot_takes_as_many_blocks_as_fit(slot_bytes: int, num_heads: int, num_legs: int) -> None:
    num_layer_blocks = LAYOUT.max_layer_blocks_per_slot(slot_bytes, num_heads, num_legs)
    used = num_legs * HEADER_BYTES + num_layer_blocks * LAYOUT.layer_block_bytes(num_heads)
    assert num_layer_blocks == 0 or used <= slot_bytes
    assert used + LAYOUT.layer_block_bytes(num_heads) > slot_bytes


@pytest.mark.parametrize("field", ["num_layers", "num_kv_heads", "head_dim", "block_size"])
def test_sizes_below_one_are_refused(field: str) -> None:
    sizes = {"num_layers": 1, "num_kv_heads": 1, "head_dim": 1, "block_size": 1, field: 0}
    with pytest.raises(InvalidArgument, match=field):
        KVLayout(**sizes, dtype="float32")


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="dtype"):
        replace(LAYOUT, dtype="int3")


def test_a_fingerprint_changes_with_everything_that_must_agree() -> None:
    same = KVLayout(num_layers=3, num_kv_heads=8, head_dim=16, block_size=4, dtype="bfloat16")
    assert LAYOUT.fingerprint(b"m", 1) == same.fingerprint(b"m", 1)
    others = [
        replace(LAYOUT, num_layers=4).fingerprint(b"m", 1),
        replace(LAYOUT, num_kv_heads=4).fingerprint(b"m", 1),
        replace(LAYOUT, head_dim=8).fingerprint(b"m", 1),
        replace(LAYOUT, block_size=8).fingerprint(b"m", 1),
        replace(LAYOUT, dtype="float16").fingerprint(b"m", 1),
        LAYOUT.fingerprint(b"n", 1),
        LAYOUT.fingerprint(b"m", 2),
    ]
    assert len({LAYOUT.fingerprint(b"m", 1), *others}) == 8


@pytest.mark.parametrize(("num_kv_heads", "tp_size"), list(product(SIZES, SIZES)))
def test_ranks_hold_every_head_equally_often(num_kv_heads: int, tp_size: int) -> None:
    owned = [heads_of_rank(num_kv_heads, tp_size, rank) for rank in range(tp_size)]
    holders = Counter(head for heads in owned for head in heads)
    assert set(holders) == set(range(num_kv_heads))
    assert set(holders.values()) == {max(1, tp_size // num_kv_heads)}
    assert {len(heads) for heads in owned} == {max(1, num_kv_heads // tp_size)}
    assert [heads.start for heads in owned] == [rank * num_kv_heads // tp_size for rank in range(tp_size)]


@pytest.mark.parametrize(("num_kv_heads", "tp_size", "rank"), [(0, 1, 0), (8, 0, 0), (8, 3, 0), (8, 2, 2)])
def test_impossible_splits_are_refused(num_kv_heads: int, tp_size: int, rank: int) -> None:
    with pytest.raises(InvalidArgument):
        heads_of_rank(num_kv_heads, tp_size, rank)


@pytest.mark.parametrize(("num_kv_heads", "prefill_tp", "decode_tp"), ALL_PAIRS)
def test_every_decode_rank_gets_each_of_its_heads_once(num_kv_heads: int, prefill_tp: int, decode_tp: int) -> None:
    received: dict[int, list[int]] = {rank: [] for rank in range(decode_tp)}
    for leg in plan_legs(num_kv_heads, prefill_tp, decode_tp):
        heads = range(leg.first_head, leg.first_head + leg.num_heads)
        assert set(heads) <= set(heads_of_rank(num_kv_heads, prefill_tp, leg.prefill_rank))
        received[leg.decode_rank] += heads
    for rank, heads_received in received.items():
        assert heads_received == list(heads_of_rank(num_kv_heads, decode_tp, rank))


@pytest.mark.parametrize(("num_kv_heads", "prefill_tp", "decode_tp"), ALL_PAIRS)
def test_replicas_share_the_sending(num_kv_heads: int, prefill_tp: int, decode_tp: int) -> None:
    legs = plan_legs(num_kv_heads, prefill_tp, decode_tp)
    load: Counter[tuple[int, int]] = Counter()  # (head, prefill rank) -> receivers
    for leg in legs:
        for head in range(leg.first_head, leg.first_head + leg.num_heads):
            load[head, leg.prefill_rank] += 1
    num_sources = max(1, prefill_tp // num_kv_heads)
    num_receivers = max(1, decode_tp // num_kv_heads)
    for head in range(num_kv_heads):
        shares = [number for (of_head, _), number in load.items() if of_head == head]
        assert len(shares) == min(num_sources, num_receivers)
        assert max(shares) == -(-num_receivers // num_sources)


@pytest.mark.parametrize(("num_kv_heads", "prefill_tp", "decode_tp"), ALL_PAIRS)
def test_a_pair_of_ranks_shares_one_leg_at_most(num_kv_heads: int, prefill_tp: int, decode_tp: int) -> None:
    legs = plan_legs(num_kv_heads, prefill_tp, decode_tp)
    assert len({(leg.prefill_rank, leg.decode_rank) for leg in legs}) == len(legs)


@pytest.mark.parametrize(("prefill_tp", "decode_tp"), [(20_000, 1), (1, 20_000), (65, 65), (0, 1), (1, 0)])
def test_more_ranks_than_a_worker_has_are_refused_at_once(prefill_tp: int, decode_tp: int) -> None:
    with pytest.raises(InvalidArgument, match="1 to 64 entries"):
        plan_legs(1, prefill_tp, decode_tp)


def test_equal_sizes_pair_rank_with_rank() -> None:
    assert plan_legs(8, 4, 4) == [Leg(rank, rank, 2 * rank, 2) for rank in range(4)]
    assert [(leg.prefill_rank, leg.decode_rank) for leg in plan_legs(2, 8, 8)] == [(r, r) for r in range(8)]


def test_a_wide_decode_rank_gathers_from_several_prefill_ranks() -> None:
    assert plan_legs(8, 4, 2) == [Leg(0, 0, 0, 2), Leg(1, 0, 2, 2), Leg(2, 1, 4, 2), Leg(3, 1, 6, 2)]


def marked(coverage: Coverage, legs: Iterable[Leg], num_kv_heads: int, decode_tp: int) -> None:
    for leg in legs:
        first = leg.first_head - heads_of_rank(num_kv_heads, decode_tp, leg.decode_rank).start
        coverage.mark(leg.decode_rank, range(first, first + leg.num_heads), range(2, 5), [7, 9])


@pytest.mark.parametrize(("num_kv_heads", "prefill_tp", "decode_tp"), ALL_PAIRS)
def test_planned_legs_cover_every_chunk(num_kv_heads: int, prefill_tp: int, decode_tp: int) -> None:
    coverage = Coverage(num_kv_heads, decode_tp, range(2, 5), [7, 9])
    marked(coverage, plan_legs(num_kv_heads, prefill_tp, decode_tp), num_kv_heads, decode_tp)
    coverage.check_complete()


@pytest.mark.parametrize("left_out", range(4))
def test_a_head_that_did_not_arrive_is_named(left_out: int) -> None:
    legs = plan_legs(8, 4, 2)
    coverage = Coverage(8, 2, range(2, 5), [7, 9])
    marked(coverage, [leg for number, leg in enumerate(legs) if number != left_out], 8, 2)
    missing = legs[left_out]
    with pytest.raises(TransferError, match=f"{missing.first_head}, .* of rank {missing.decode_rank} did not arrive"):
        coverage.check_complete()


@pytest.mark.parametrize("local_heads", [range(2), range(1, 3), range(3, 5), range(4, 6), range(0)], ids=str)
def test_heads_that_were_written_before_or_belong_to_another_rank_are_refused(local_heads: range) -> None:
    coverage = Coverage(8, 2, range(2, 5), [7, 9])
    coverage.mark(1, range(2), range(2, 5), [7, 9])
    with pytest.raises(TransferError, match="before or are not its own"):
        coverage.mark(1, local_heads, range(2, 5), [7, 9])


@pytest.mark.parametrize(
    ("layers", "block_ids"), [(range(2, 4), [7, 9]), (range(5), [7, 9]), (range(2, 5), [7]), (range(2, 5), [9, 7])]
)
def test_other_layers_or_blocks_are_refused(layers: range, block_ids: list[int]) -> None:
    with pytest.raises(TransferError, match="other layers or blocks"):
        Coverage(8, 2, range(2, 5), [7, 9]).mark(0, range(4), layers, block_ids)
