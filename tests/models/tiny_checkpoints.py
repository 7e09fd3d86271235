"""Tiny random checkpoints, one per family, written by transformers itself, with a tokenizer; for all tests."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

VOCAB_SIZE: Final = 320
CONTEXT_LENGTH: Final = 4096
BOS_TOKEN_ID: Final = 0
EOS_TOKEN_ID: Final = 1

_SIZES: Final = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_LENGTH,
    "bos_token_id": BOS_TOKEN_ID,
    "eos_token_id": EOS_TOKEN_ID,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,  # the default of 0.02 gives logits so flat that a wrong kernel goes unseen
}
_LLAMA3_ROPE: Final = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

FAMILIES: Final = (
    "llama2",
    "llama3",
    "llama_linear",
    "llama_tied",
    "llama_bias",
    "llama_sharded",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "mistral",
    "mistral_window",
)


def write_tiny_checkpoint(family: str, path: Path, seed: int) -> Path:
    """Write a random model of the family, with `tokenizer.json`, into `path` and return it. Same seed, same weights."""
    config = _config(family)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _randomise_flat_tensors(model)
    model.save_pretrained(path, max_shard_size="200KB" if family == "llama_sharded" else "5GB")
    _tokenizer().save_pretrained(path)
    return path


def _config(family: str) -> PretrainedConfig:
    match family:
        case "llama2" | "llama_sharded":
            return LlamaConfig(**_SIZES | {"num_key_value_heads": 4})
        case "llama3":
            return LlamaConfig(**_SIZES, rope_parameters=_LLAMA3_ROPE)
        case "llama_linear":
            rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
            return LlamaConfig(**_SIZES, rope_parameters=rope)
        case "llama_tied":
            return LlamaConfig(**_SIZES | {"tie_word_embeddings": True})
        case "llama_bias":
            return LlamaConfig(**_SIZES, attention_bias=True, mlp_bias=True)
        case "qwen2":
            return Qwen2Config(**_SIZES)
        case "qwen2_window":
            return Qwen2Config(**_SIZES, use_sliding_window=True, sliding_window=32, max_window_layers=1)
        case "qwen3":
            return Qwen3Config(**_SIZES, head_dim=32)
        case "mistral":
            return MistralConfig(**_SIZES, sliding_window=None)
        case "mistral_window":
            return MistralConfig(**_SIZES, sliding_window=32)
    raise ValueError(f"unknown family {family!r}")


def _randomise_flat_tensors(model: PreTrainedModel) -> None:
    """Norms start as ones and biases as zeros, which would hide that they are ignored."""
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.3)


def _tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: 2 special tokens, 256 bytes, and merges up to the vocabulary's size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the runner hands the baton to the next runner, and the race goes on; who drops it has to run back for it"
    tokenizer.train_from_iterator([text] * 8, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
