"""Block hashes: prefix identity, salts, packing."""

import struct
from array import array
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidArgument
from common.kvcache.block_hash import DIGEST_BYTES, hash_block, hash_blocks, root_hash, tenant_salt

tokens = st.lists(st.integers(0, 3), max_size=24)
exhaustive = settings(deadline=None, max_examples=200, derandomize=True, database=None)


@exhaustive
@given(tokens, st.integers(1, 5))
def test_one_digest_per_full_block(token_ids: list[int], block_size: int) -> None:
    hashes = hash_blocks(token_ids, block_size, b"salt")
    assert len(hashes) == len(token_ids) // block_size
    assert all(len(block_hash) == DIGEST_BYTES for block_hash in hashes)


@exhaustive
@given(tokens, tokens, st.integers(1, 4))
def test_digests_agree_exactly_as_far_as_the_tokens_do(a: list[int], b: list[int], block_size: int) -> None:
    hashes_a, hashes_b = hash_blocks(a, block_size, b"salt"), hash_blocks(b, block_size, b"salt")
    for index, (hash_a, hash_b) in enumerate(zip(hashes_a, hashes_b, strict=False)):
        end = (index + 1) * block_size
        assert (hash_a == hash_b) == (a[:end] == b[:end])


@exhaustive
@given(tokens, st.integers(1, 4))
def test_hashing_block_by_block_gives_the_same_chain(token_ids: list[int], block_size: int) -> None:
    chain, parent = [], root_hash(b"salt")
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        parent = hash_block(parent, token_ids[start : start + block_size])
        chain.append(parent)
    assert chain == hash_blocks(token_ids, block_size, b"salt")


def test_tokens_are_packed_as_little_endian_uint32() -> None:
    token_ids = [1, 70_000, 2**32 - 1]
    expected = blake2b(root_hash(b"s") + struct.pack("<3I", *token_ids), digest_size=16).digest()
    assert hash_blocks(token_ids, 3, b"s") == [expected]


def test_packed_tokens_hash_as_any_others() -> None:
    token_ids = list(range(100))
    assert hash_blocks(array("I", token_ids), 16, b"s") == hash_blocks(token_ids, 16, b"s")


def test_the_same_tokens_at_another_place_hash_differently() -> None:
    first, second = hash_blocks([1, 2, 1, 2], 2, b"salt")
    assert first != second


def test_salts_separate_tenants_and_models() -> None:
    salts = {tenant_salt(tenant, model) for tenant in ("a", "b", "") for model in (b"m", b"n", b"")}
    assert len(salts) == 9
    hashes = {hash_blocks([1, 2], 2, salt)[0] for salt in salts}
    assert len(hashes) == 9


def test_a_salt_keeps_the_border_between_model_and_tenant() -> None:
    assert tenant_salt("bc", b"a") != tenant_salt("c", b"ab")


@pytest.mark.parametrize("token_id", [-1, 2**32])
def test_a_token_that_is_no_uint32_is_refused(token_id: int) -> None:
    with pytest.raises(InvalidArgument, match="token_ids"):
        hash_blocks([token_id], 1, b"")


def test_a_block_size_below_one_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="block_size"):
        hash_blocks([1], 0, b"")
