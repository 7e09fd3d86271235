"""Who gives way when blocks are wanted: the choice alone, as pure functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from services.decode.request import DecodeSequence, SequenceState


def youngest(sequences: Iterable[DecodeSequence]) -> DecodeSequence:
    """Of those that decode, it is the youngest that gives way: the oldest never does, so it finishes."""
    return max(sequences, key=lambda seq: seq.serial)


def idlest(seq: DecodeSequence, sequences: Collection[DecodeSequence]) -> DecodeSequence:
    """Who gives way to `seq`, which alone decodes or wants to: the youngest that only holds cached blocks, else the
    youngest that is receiving, else `seq` itself."""
    for state in (SequenceState.OPEN, SequenceState.RECEIVING):
        others = [other for other in sequences if other.state is state and other.blocks.block_ids]
        if others := [other for other in others if other is not seq]:
            return youngest(others)
    # It received blocks that another had at the same time, and holds those too (see KVCacheManager). When it
    # comes back, it finds them in the cache.
    assert seq.blocks.anchors, "a sequence that fits alone has no block, and nobody else holds any"
    return seq
