"""Rectangles of blocks and layers: taken once, in place once, whole blocks reported when their last layer is there."""

from __future__ import annotations

from baton.v1 import kv_pb2

from services.decode.handoff_coverage import HandoffCoverage


def chunk(first_block: int, num_blocks: int, first_layer: int, num_layers: int) -> kv_pb2.ChunkOffer:
    return kv_pb2.ChunkOffer(
        first_block=first_block, num_blocks=num_blocks, first_layer=first_layer, num_layers=num_layers
    )


def test_block_is_complete_with_its_last_layer() -> None:
    coverage = HandoffCoverage(num_reused=1, num_layers=3)
    lower, upper = chunk(1, 3, 0, 2), chunk(1, 2, 2, 1)
    assert coverage.take(lower)
    assert coverage.take(upper)
    assert coverage.place(upper) == []
    assert coverage.place(lower) == [1, 2]
    assert coverage.take(chunk(3, 1, 2, 1))
    assert coverage.place(chunk(3, 1, 2, 1)) == [3]


def test_what_overlaps_is_refused_without_effect() -> None:
    coverage = HandoffCoverage(num_reused=1, num_layers=3)
    assert not coverage.take(chunk(0, 2, 0, 1)), "block 0 is reused"
    assert coverage.take(chunk(1, 2, 1, 1))
    assert not coverage.take(chunk(2, 2, 0, 2))
    assert coverage.take(chunk(3, 1, 0, 2)), "the refused chunk took nothing"


def test_rejected_layers_may_come_again_and_are_counted_by_themselves() -> None:
    coverage = HandoffCoverage(num_reused=0, num_layers=2)
    for _ in range(2):
        assert coverage.take(chunk(0, 2, 0, 1))
        coverage.reject(chunk(0, 2, 0, 1))
    assert coverage.num_rejections(chunk(1, 1, 0, 2)) == 2
    assert coverage.num_rejections(chunk(0, 2, 1, 1)) == 0
    assert coverage.take(chunk(0, 2, 0, 2))
