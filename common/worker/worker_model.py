"""The model as a front needs to know it: limits, KV layout and fingerprint; read without torch, weights unread."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import InvalidArgument
from common.kernels.head_sizes import check_head_dim
from common.kvcache.layout import KVLayout, heads_of_rank
from common.models.checkpoint import drawn_model_digest, model_digest
from common.models.config import DTYPES, ModelConfig, read_model_config
from common.models.weights_check import check_weights, stored_dtype

PROTOCOL_VERSION = 3  # of hand-off messages and payloads; part of the layout fingerprint


@dataclass(frozen=True, slots=True)
class WorkerModel:
    """What a worker serves. `dtype` is resolved: of weights, activations and KV cache."""

    name: str
    config: ModelConfig
    dtype: str
    layout: KVLayout
    digest: bytes
    fingerprint: str


def read_worker_model(
    model_dir: Path, device: str, dtype: str, block_size: int, tp_size: int, random_weights: bool = False
) -> WorkerModel:
    """Read `model_dir` for a worker with `tp_size` ranks. `dtype` may be `auto`; for random weights config.json is
    enough.

    Raises `ModelError` for a checkpoint that cannot be served, `InvalidArgument` for a setting that does not fit it.
    """
    config = read_model_config(model_dir)
    check_head_dim(config.head_dim, device)
    if not random_weights:
        check_weights(model_dir, config)
    if config.dtype is None and not random_weights:
        config = replace(config, dtype=stored_dtype(model_dir))
    resolved = resolve_dtype(dtype, device, config)
    heads_of_rank(config.num_kv_heads, tp_size, 0)
    if config.num_heads % tp_size:
        raise InvalidArgument("tp_size", tp_size, f"must divide the model's {config.num_heads} attention heads")
    layout = KVLayout(config.num_layers, config.num_kv_heads, config.head_dim, block_size, resolved)
    digest = drawn_model_digest(model_dir) if random_weights else model_digest(model_dir)
    fingerprint = layout.fingerprint(digest, PROTOCOL_VERSION)
    return WorkerModel(model_dir.resolve().name, config, resolved, layout, digest, fingerprint)


def resolve_dtype(dtype: str, device: str, config: ModelConfig) -> str:
    """`auto` is the checkpoint's dtype, but float32 on a CPU, whose half precision is slow and inexact.

    Raises `InvalidArgument` for what ranks do not compute in.
    """
    if dtype == "auto":
        return "float32" if device == "cpu" or config.dtype is None else config.dtype
    if dtype not in DTYPES:
        raise InvalidArgument("dtype", dtype, f"must be auto or one of {', '.join(DTYPES)}")
    return dtype
