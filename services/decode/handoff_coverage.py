"""Which layers of which blocks of one hand-off are on their way or in place. Pure.

A chunk is a rectangle of blocks and layers; each layer of each block is taken once, and in place once. A bit mask of
layers for each block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from baton.v1 import kv_pb2


class HandoffCoverage:
    """Blocks [0, num_reused) are in place from the start."""

    def __init__(self, num_reused: int, num_layers: int) -> None:
        self._whole = (1 << num_layers) - 1
        self._taken: dict[int, int] = dict.fromkeys(range(num_reused), self._whole)
        self._in_place: dict[int, int] = {}
        # By block and layer, as a peer may number its chunks as it likes.
        self._num_rejections: Counter[tuple[int, int]] = Counter()

    def take(self, chunk: kv_pb2.ChunkOffer) -> bool:
        """The chunk is on its way. False, without effect, if some of it is in place, or on its way already: what is in
        place may be shared by now, and nobody writes to it again."""
        layers = _layers(chunk)
        if any(self._taken.get(block, 0) & layers for block in _blocks(chunk)):
            return False
        for block in _blocks(chunk):
            self._taken[block] = self._taken.get(block, 0) | layers
        return True

    def reject(self, chunk: kv_pb2.ChunkOffer) -> None:
        """It did not arrive: it may be offered again."""
        for block in _blocks(chunk):
            self._taken[block] &= ~_layers(chunk)
        self._num_rejections.update(_cells(chunk))

    def num_rejections(self, chunk: kv_pb2.ChunkOffer) -> int:
        """How often some part of it was rejected."""
        return max(self._num_rejections[cell] for cell in _cells(chunk)) if self._num_rejections else 0

    def place(self, chunk: kv_pb2.ChunkOffer) -> list[int]:
        """It is in place; the blocks that are complete since."""
        complete = []
        for block in _blocks(chunk):
            self._in_place[block] = self._in_place.get(block, 0) | _layers(chunk)
            if self._in_place[block] == self._whole:
                complete.append(block)
        return complete


def _blocks(chunk: kv_pb2.ChunkOffer) -> range:
    return range(chunk.first_block, chunk.first_block + chunk.num_blocks)


def _layers(chunk: kv_pb2.ChunkOffer) -> int:
    return (1 << chunk.num_layers) - 1 << chunk.first_layer


def _cells(chunk: kv_pb2.ChunkOffer) -> Iterator[tuple[int, int]]:
    layers = range(chunk.first_layer, chunk.first_layer + chunk.num_layers)
    return ((block, layer) for block in _blocks(chunk) for layer in layers)
