"""Into which chunks the blocks of one step are cut for the hand-off. Pure.

         blocks ──────────────►
layers   ┌──────────────┐
   │     │   chunk 0    │    a step stores layer after layer, for all of its tokens: so chunks are runs of layers of
   │     ├──────────────┤    all blocks of the step, and leave while it computes the next layers. Few blocks make one
   ▼     │   chunk 1    │    chunk of all layers; more blocks than a slot holds of one layer are cut as well.
         └──────────────┘
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChunkShape:
    """`num_layers` layers from `first_layer` on, of `num_blocks` blocks of a sequence from `first_block` on."""

    first_block: int
    num_blocks: int
    first_layer: int
    num_layers: int

    @property
    def end_block(self) -> int:
        return self.first_block + self.num_blocks

    @property
    def num_stored_layers(self) -> int:
        """How many layers a step must have stored before the chunk can be sent."""
        return self.first_layer + self.num_layers


def cut_chunks(
    first_block: int, end_block: int, num_layers: int, last_layer_blocks: int, max_layer_blocks: int
) -> list[ChunkShape]:
    """Chunks of blocks [first_block, end_block), in the order in which a step stores them.

    `max_layer_blocks` >= 1: blocks times layers of a chunk. The last one has about `last_layer_blocks` if that is less,
    as nothing is computed any more while it travels; those before it have as many as they may, as each gather holds up
    the step a little. Up to twice `last_layer_blocks` are not cut.
    """
    num_blocks = min(end_block - first_block, max_layer_blocks)
    most = max_layer_blocks // num_blocks  # layers
    last = min(num_layers, most, max(1, last_layer_blocks // num_blocks))
    if num_layers <= min(most, 2 * last_layer_blocks // num_blocks):
        last = num_layers
    before = num_layers - last
    group = -(-before // -(-before // most)) if before else 1
    starts = [*range(0, before, group), before]
    ends = [*starts[1:], num_layers]
    return [
        ChunkShape(block, min(num_blocks, end_block - block), layer, end - layer)
        for layer, end in zip(starts, ends, strict=True)
        for block in range(first_block, end_block, num_blocks)
    ]
