"""Blocks through a staging slot and back: nothing is lost, and nothing damaged is let in."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import DigestMismatch, InternalError, Truncated
from common.kernels import reference, triton_backend
from common.kernels.backend import KernelBackend
from common.kvcache.layout import HEADER_BYTES, KVLayout, plan_legs
from common.kvcache.storage import KVStorage

LAYERS, BLOCKS, BLOCK_SIZE, HEAD_DIM = 3, 12, 16, 64
SHARED = [HealthCheck.function_scoped_fixture]  # the way to the digests is the same for all examples
TAG = 0xFEDC_BA98_7654_3210


@dataclass(frozen=True, slots=True)
class Place:
    """Where the blocks are, and by what they are moved."""

    device: torch.device
    kernels: KernelBackend

    @property
    def checks_on_device(self) -> bool:
        return self.kernels is not REFERENCE


REFERENCE = cast(KernelBackend, reference)
HOST = Place(torch.device("cpu"), REFERENCE)
# Without a GPU an interpreter plays the device.
DEVICE = Place(torch.device("cuda" if torch.cuda.is_available() else "cpu"), cast(KernelBackend, triton_backend))
here = HOST  # of the test that runs


@pytest.fixture(
    params=[pytest.param(HOST, id="reference"), pytest.param(DEVICE, id="triton", marks=pytest.mark.gpu)], autouse=True
)
def place(request: pytest.FixtureRequest) -> Iterator[None]:
    """Checked by the host, and by the device."""
    global here
    here = request.param
    yield
    here = HOST


def bytes_of(num_bytes: int, fill: int = 0) -> torch.Tensor:
    """A slot."""
    slot = torch.full((num_bytes,), fill, dtype=torch.uint8, device=here.device)
    synchronize()
    return slot


def synchronize() -> None:
    """Copies run on a stream of their own: what tests do to slots and blocks must be over before."""
    if here.device.type == "cuda":
        torch.cuda.synchronize()


def storage(num_kv_heads: int = 4, dtype: torch.dtype = torch.float32, seed: int | None = None) -> KVStorage:
    """Noise if there is a seed, else zeros."""
    made = KVStorage(LAYERS, BLOCKS, num_kv_heads, BLOCK_SIZE, HEAD_DIM, dtype, here.device, here.kernels)
    if seed is not None:
        made.kv.copy_(torch.randn(made.kv.shape, generator=torch.Generator().manual_seed(seed)))
    synchronize()
    return made


def filled_slot(source: KVStorage, block_ids: list[int]) -> torch.Tensor:
    slot = bytes_of(source.leg_bytes(len(block_ids), 2))
    source.gather(block_ids, 1, 2, slot, TAG)
    return slot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_payload_is_the_blocks_in_the_order_asked_for(dtype: torch.dtype) -> None:
    source = storage(dtype=dtype, seed=1)
    slot = bytes_of(1 << 20)
    num_bytes = source.gather([7, 2, 9], 1, 2, slot, TAG)
    payload = slot[HEADER_BYTES:num_bytes].view(dtype).view(LAYERS, 3, 2, 2, BLOCK_SIZE, HEAD_DIM)
    assert torch.equal(payload, source.kv[:, [7, 2, 9], :, 1:3])
    layout = KVLayout(LAYERS, 4, HEAD_DIM, BLOCK_SIZE, str(dtype).removeprefix("torch."))
    assert num_bytes == layout.leg_bytes(3, layout.num_layers, 2) == source.leg_bytes(3, 2)


def test_scatter_writes_only_the_heads_and_blocks_named() -> None:
    source, target = storage(seed=1), storage(seed=2)
    before = target.kv.clone()
    target.scatter([5, 0], 2, 2, filled_slot(source, [7, 2]), TAG)
    expected = before.clone()
    expected[:, [5, 0], :, 2:4] = source.kv[:, [7, 2], :, 1:3]
    assert torch.equal(target.kv, expected)


def test_a_run_of_layers_travels_by_itself() -> None:
    source, target = storage(seed=1), storage(seed=2)
    before = target.kv.clone()
    layers = range(1, LAYERS)
    num_bytes = source.leg_bytes(2, 2, layers)
    assert num_bytes - HEADER_BYTES == (source.leg_bytes(2, 2) - HEADER_BYTES) * len(layers) // LAYERS
    slot = bytes_of(num_bytes)
    assert source.gather([7, 2], 1, 2, slot, TAG, layers) == num_bytes
    with pytest.raises(Truncated):
        target.scatter([5, 0], 1, 2, slot, TAG)
    assert torch.equal(target.kv, before)
    target.scatter([5, 0], 1, 2, slot, TAG, layers)
    assert torch.equal(target.kv[1:, [5, 0], :, 1:3], source.kv[1:, [7, 2], :, 1:3])
    target.kv[1:, [5, 0], :, 1:3] = before[1:, [5, 0], :, 1:3]
    assert torch.equal(target.kv, before)


@pytest.mark.parametrize("layers", [range(0), range(-1, 1), range(1, LAYERS + 1), range(1, 1)])
def test_layers_outside_the_storage_are_refused(layers: range) -> None:
    with pytest.raises(InternalError, match="not within"):
        storage().gather([0], 0, 1, bytes_of(1 << 20), TAG, layers)


@settings(deadline=None, max_examples=20, suppress_health_check=SHARED)
@given(
    num_kv_heads=st.sampled_from([1, 2, 4, 8]),
    prefill_tp=st.sampled_from([1, 2, 4]),
    decode_tp=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 1000),
)
def test_legs_between_any_two_groups_bring_every_head_over(
    num_kv_heads: int, prefill_tp: int, decode_tp: int, seed: int
) -> None:
    whole = storage(num_kv_heads, seed=seed).kv
    rng = random.Random(seed)
    source_ids, target_ids = rng.sample(range(BLOCKS), 4), rng.sample(range(BLOCKS), 4)

    def first_head(rank: int, size: int) -> int:
        return rank * num_kv_heads // size

    def rank_storage(size: int) -> KVStorage:
        return storage(max(1, num_kv_heads // size))

    senders = [rank_storage(prefill_tp) for _ in range(prefill_tp)]
    for rank, sender in enumerate(senders):
        first = first_head(rank, prefill_tp)
        sender.kv.copy_(whole[:, :, :, first : first + sender.shape.num_kv_heads])
    synchronize()
    receivers = [rank_storage(decode_tp) for _ in range(decode_tp)]
    for leg in plan_legs(num_kv_heads, prefill_tp, decode_tp):
        sender, receiver = senders[leg.prefill_rank], receivers[leg.decode_rank]
        slot = bytes_of(sender.leg_bytes(4, leg.num_heads))
        local = leg.first_head - first_head(leg.prefill_rank, prefill_tp)
        sender.gather(source_ids, local, leg.num_heads, slot, TAG)
        local = leg.first_head - first_head(leg.decode_rank, decode_tp)
        receiver.scatter(target_ids, local, leg.num_heads, slot, TAG)
    for rank, receiver in enumerate(receivers):
        first = first_head(rank, decode_tp)
        expected = whole[:, source_ids, :, first : first + receiver.shape.num_kv_heads]
        assert torch.equal(receiver.kv[:, target_ids], expected)


@settings(deadline=None, max_examples=60, suppress_health_check=SHARED)
@given(data=st.data())
def test_a_flipped_bit_anywhere_reaches_no_block(data: st.DataObject) -> None:
    target = storage()
    slot = filled_slot(storage(seed=1), [7, 2])
    meaningful = [*range(12), *range(16, 40), *range(HEADER_BYTES, slot.numel())]
    byte, bit = data.draw(st.sampled_from(meaningful)), data.draw(st.integers(0, 7))
    slot[byte] ^= 1 << bit
    synchronize()
    with pytest.raises((DigestMismatch, Truncated)):
        target.scatter([0, 1], 0, 2, slot, TAG)
    assert not target.kv.any()


def test_the_tag_of_another_grant_is_refused() -> None:
    target = storage()
    with pytest.raises(DigestMismatch, match="carries tag fedcba9876543210"):
        target.scatter([0, 1], 0, 2, filled_slot(storage(seed=1), [7, 2]), TAG + 1)
    assert not target.kv.any()


def test_another_number_of_bytes_than_expected_is_refused() -> None:
    target = storage()
    slot = filled_slot(storage(seed=1), [7, 2])
    with pytest.raises(Truncated, match="arrived"):
        target.scatter([0, 1], 0, 2, slot[:-1], TAG)
    with pytest.raises(Truncated, match="announces"):
        target.scatter([0], 0, 2, slot, TAG)
    assert not target.kv.any()


def test_bytes_that_were_never_gathered_are_refused() -> None:
    with pytest.raises(DigestMismatch, match="no KV payload"):
        storage().scatter([0], 0, 2, bytes_of(1 << 20), TAG)


@pytest.mark.parametrize(
    ("block_ids", "first_head", "num_heads"),
    [([BLOCKS], 0, 1), ([-1], 0, 1), ([], 0, 1), ([0], 3, 2), ([0], -1, 2), ([0], 0, 0)],
)
def test_blocks_and_heads_outside_the_storage_are_refused(
    block_ids: list[int], first_head: int, num_heads: int
) -> None:
    with pytest.raises(InternalError, match="not within"):
        storage().gather(block_ids, first_head, num_heads, bytes_of(1 << 20), TAG)


def test_a_slot_that_is_too_small_is_refused() -> None:
    with pytest.raises(InternalError, match="do not fit"):
        storage().gather([0], 0, 1, bytes_of(HEADER_BYTES), TAG)


def test_copies_that_were_started_together_do_not_meet() -> None:
    """Each has its own ids, header and verdict, also of several sizes, and whoever asks last learns the same."""
    source, target = storage(seed=1), storage(seed=2)
    before = target.kv.clone()
    id_lists = [[7, 2], [3], [11, 0, 5, 9], [8], [1, 10]]
    slots = [bytes_of(source.leg_bytes(4, 2)) for _ in id_lists]
    works = [
        source.start_gather(ids, 1, 2, slot, TAG + n) for n, (ids, slot) in enumerate(zip(id_lists, slots, strict=True))
    ]
    for work in works:
        work.wait()
    slots[3][HEADER_BYTES + 99] ^= 1
    synchronize()
    if here.checks_on_device:
        tags = [TAG + n for n in range(5)]
    else:  # a host looks before it returns
        with pytest.raises(DigestMismatch):
            target.start_scatter(id_lists[3], 1, 2, slots[3], TAG + 3)
        del id_lists[3], slots[3]
        tags = [TAG, TAG + 1, TAG + 2, TAG + 4]
    works = [target.start_scatter(ids, 1, 2, slot, tag) for ids, slot, tag in zip(id_lists, slots, tags, strict=True)]
    for work, tag in reversed(list(zip(works, tags, strict=True))):
        work.wait()
        if tag == TAG + 3:
            with pytest.raises(DigestMismatch, match="payload digest"):
                work.result()
        else:
            work.result()
    arrived = [7, 2, 3, 11, 0, 5, 9, 1, 10]
    before[:, arrived, :, 1:3] = source.kv[:, arrived, :, 1:3]
    assert torch.equal(target.kv, before)


def test_a_device_writes_the_slot_that_a_host_writes_and_takes_it_in_again() -> None:
    source = storage(seed=1)
    slot = filled_slot(source, [7, 2])
    host = KVStorage(LAYERS, BLOCKS, 4, BLOCK_SIZE, HEAD_DIM, torch.float32, HOST.device, REFERENCE)
    host.kv.copy_(source.kv)
    expected = torch.zeros_like(slot, device="cpu")
    host.gather([7, 2], 1, 2, expected, TAG)
    assert torch.equal(slot.cpu(), expected)
    work = source.start_scatter([5, 0], 1, 2, slot, TAG)
    work.wait()
    assert work.done()
    work.result()
    assert torch.equal(source.kv[:, [5, 0], :, 1:3].cpu(), host.kv[:, [7, 2], :, 1:3])
