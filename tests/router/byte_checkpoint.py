"""A checkpoint directory without weights whose tokens are single bytes, so that tests can read token ids as text."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

EOS_TOKEN_ID = 0
USER_TOKEN_ID = 257  # `<user>`: special, and no end of sequence
CONTEXT_LENGTH = 512
VOCAB_SIZE = 300
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}"


def write_byte_checkpoint(directory: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """Write config.json and the tokenizer's files. Returns the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<eos>": EOS_TOKEN_ID} | {character: index + 1 for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<eos>", "<user>")])
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "architectures": ["Qwen3ForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": CONTEXT_LENGTH,
        "eos_token_id": EOS_TOKEN_ID,
    }
    (directory / "config.json").write_text(json.dumps(config))
    tokenizer_config = {"eos_token": "<eos>"}
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return directory


def byte_ids(text: str) -> list[int]:
    """The token ids of a text."""
    order = sorted(pre_tokenizers.ByteLevel.alphabet())
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return [order.index(character) + 1 for word, _ in encoded for character in word]
