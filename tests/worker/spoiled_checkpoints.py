"""Checkpoints of which one token's numbers overflow, and nothing of the others'; for tests."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tests.models.tiny_checkpoints import write_tiny_checkpoint

INFINITE_EMBEDDING, INFINITE_KEY = FAULTS = ("infinite embedding", "infinite key")


def write_spoiled_checkpoint(path: Path, token_id: int, fault: str, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny Llama. With `INFINITE_EMBEDDING` nothing that is computed of the token is a number.

    With `INFINITE_KEY` its first layer has a key that overflows, of the last head alone: a rank of two has it, and what
    the token itself reads of the blocks, zero instead, is sound.
    """
    path = write_tiny_checkpoint("llama2", path, seed=1)
    tensors = load_file(path / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    if fault == INFINITE_EMBEDDING:
        embedding[token_id, 3] = float("inf")
    else:
        embedding[:, 5] = 0.0
        embedding[token_id, 5] = 4.0
        tensors["model.layers.0.self_attn.k_proj.weight"][-1, 5] = torch.finfo(dtype).max / 2
    save_file(tensors, path / "model.safetensors")
    return path
