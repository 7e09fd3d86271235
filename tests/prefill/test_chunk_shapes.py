"""Chunks of a step: each layer of each block once, within the slot, in the order in which layers are stored."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from services.prefill.chunk_shapes import ChunkShape, cut_chunks


@settings(deadline=None, max_examples=300, derandomize=True, database=None)
@given(
    first_block=st.integers(0, 5),
    num_blocks=st.integers(1, 70),
    num_layers=st.integers(1, 80),
    last=st.integers(0, 300),
    most=st.integers(1, 300),
)
def test_every_layer_of_every_block_once(
    first_block: int, num_blocks: int, num_layers: int, last: int, most: int
) -> None:
    chunks = cut_chunks(first_block, first_block + num_blocks, num_layers, last, most)
    cells = [
        (block, layer)
        for chunk in chunks
        for block in range(chunk.first_block, chunk.first_block + chunk.num_blocks)
        for layer in range(chunk.first_layer, chunk.num_stored_layers)
    ]
    blocks = range(first_block, first_block + num_blocks)
    assert sorted(cells) == [(block, layer) for block in blocks for layer in range(num_layers)]
    assert all(chunk.num_blocks * chunk.num_layers <= most for chunk in chunks)
    assert chunks[-1].num_blocks * chunks[-1].num_layers <= max(num_blocks, 2 * last)
    assert [chunk.num_stored_layers for chunk in chunks] == sorted(chunk.num_stored_layers for chunk in chunks)


def test_few_blocks_are_one_chunk_and_many_are_layers_of_all_of_them() -> None:
    assert cut_chunks(3, 6, num_layers=32, last_layer_blocks=64, max_layer_blocks=256) == [ChunkShape(3, 3, 0, 32)]
    many = cut_chunks(0, 32, num_layers=32, last_layer_blocks=64, max_layer_blocks=256)
    assert [(shape.num_blocks, shape.num_layers) for shape in many] == [(32, 8), (32, 8), (32, 8), (32, 6), (32, 2)]


def test_more_blocks_than_a_slot_has_of_one_layer_are_cut_too() -> None:
    shapes = cut_chunks(0, 5, num_layers=2, last_layer_blocks=100, max_layer_blocks=3)
    assert [(shape.first_layer, shape.first_block, shape.num_blocks) for shape in shapes] == [
        (0, 0, 3),
        (0, 3, 2),
        (1, 0, 3),
        (1, 3, 2),
    ]
