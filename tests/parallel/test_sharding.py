"""Every head, column and vocabulary row is on exactly one rank; KV heads follow their query heads."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ModelError
from common.models.config import ModelConfig
from common.models.rope_config import RopeConfig
from common.parallel.sharding import shard_of


def config(num_heads: int, num_kv_heads: int, intermediate_size: int = 100, vocab_size: int = 101) -> ModelConfig:
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=intermediate_size,
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=16,
        rms_norm_eps=1e-6,
        context_length=128,
        rope=RopeConfig("default", 10000.0),
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=False,
        windows=(None,),
        dtype="float32",
    )


@settings(deadline=None, max_examples=200)
@given(
    kv_bits=st.integers(0, 3),
    group_bits=st.integers(0, 3),
    size_bits=st.integers(0, 3),
    intermediate=st.integers(8, 300),
    vocab=st.integers(8, 300),
)
def test_shards_cover_the_model(kv_bits: int, group_bits: int, size_bits: int, intermediate: int, vocab: int) -> None:
    model = config(1 << kv_bits + group_bits, 1 << kv_bits, intermediate, vocab)
    size = 1 << min(size_bits, kv_bits + group_bits)
    shards = [shard_of(model, rank, size) for rank in range(size)]
    assert [head for shard in shards for head in shard.heads] == list(range(model.num_heads))
    assert [column for shard in shards for column in shard.intermediate] == list(range(intermediate))
    assert [row for shard in shards for row in shard.vocab] == list(range(vocab))
    group = model.num_heads // model.num_kv_heads
    for shard in shards:
        assert sorted({head // group for head in shard.heads}) == list(shard.kv_heads)


@pytest.mark.parametrize(("heads", "kv_heads", "size", "named"), [(6, 2, 4, "6 query"), (12, 4, 6, "4 KV")])
def test_heads_that_do_not_divide_are_refused(heads: int, kv_heads: int, size: int, named: str) -> None:
    with pytest.raises(ModelError, match=named):
        shard_of(config(heads, kv_heads), 0, size)


def test_a_rank_outside_the_group_is_refused() -> None:
    with pytest.raises(ModelError, match="rank 2"):
        shard_of(config(4, 2), 2, 2)
