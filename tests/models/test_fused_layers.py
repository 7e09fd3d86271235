"""The decoder on the GPU's backend with products that end with what were kernels of their own, against transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from common.kernels import cuda_backend, triton_linear
from common.kernels.backend import KernelBackend
from common.kernels.linear_tuning import Kind, LinearTuning
from common.kernels.scaled_rows import ScaledRows
from common.models.config import read_model_config
from common.models.decoder import Decoder
from common.models.weights import load_weights
from common.parallel.group import TensorParallelGroup
from common.parallel.sharding import shard_of
from tests.models.paged_run import CPU, load_reference, paged_logprobs, random_tokens, reference_logprobs
from tests.models.tiny_checkpoints import VOCAB_SIZE, write_tiny_checkpoint

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs the interpreter")
TOLERANCE = 1e-4
TUNING = LinearTuning(8, 16, 2, num_stages=2, use_tma=False)  # which wants aligned weights, as GPUs have


def decoder_of(path: Path) -> Decoder:
    config = read_model_config(path)
    kernels, shard = cast(KernelBackend, cuda_backend), shard_of(config, 0, 1)
    weights = load_weights(path, config, shard, torch.float32, CPU, kernels.layout_weight)
    return Decoder(config, shard, weights, kernels, TensorParallelGroup.single())


@pytest.mark.parametrize(
    ("family", "ahead"),
    [
        ("llama3", set(Kind)),
        ("llama3", {Kind.PLAIN}),
        ("llama3", {Kind.GATED, Kind.ROTATED}),
        ("qwen2", set(Kind)),  # with biases
        ("qwen3", set(Kind)),  # with norms of Q and K
    ],
)
def test_fused_layers_agree_with_transformers(
    family: str, ahead: set[Kind], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever products fuse: what another kernel must finish or begin is finished or begun."""
    calls = dict.fromkeys(("qkv_rope_store_few", "linear_add_scale_few", "gate_up_silu_few", "finished"), 0)

    def count(name: str) -> None:
        own = getattr(cuda_backend, name)

        def counted(*args: Any) -> Any:
            calls[name] += name != "finished" or isinstance(args[0], ScaledRows)
            return own(*args)

        monkeypatch.setattr(cuda_backend, name, counted)

    for name in calls:
        count(name)
    monkeypatch.setattr(cuda_backend, "is_ahead", lambda x, w, kind: kind in ahead and triton_linear.supports(x, w))
    monkeypatch.setattr(triton_linear, "default_tuning", lambda *shape: TUNING)
    path = write_tiny_checkpoint(family, tmp_path, seed=1)
    sequences = [random_tokens(length, VOCAB_SIZE, seed=length) for length in (20, 5)]
    steps = [[18, 4], [1, 1], [1, 0]]
    reference = load_reference(path)
    found = paged_logprobs(decoder_of(path), sequences, steps, seed=3)
    for own, sequence in zip(found, sequences, strict=True):
        assert (own - reference_logprobs(reference, sequence)).abs().max().item() < TOLERANCE
    rotates = Kind.ROTATED in ahead and family == "llama3"
    assert (calls["qkv_rope_store_few"] > 0) == rotates
    assert (calls["gate_up_silu_few"] > 0) == (Kind.GATED in ahead)
    assert (calls["linear_add_scale_few"] > 0) == (Kind.PLAIN in ahead)
    # What o and down began, and gate and up, or qkv, did not finish.
    assert (calls["finished"] > 0) == (Kind.PLAIN in ahead and not (rotates and Kind.GATED in ahead))
