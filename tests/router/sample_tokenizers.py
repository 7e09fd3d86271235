"""Small tokenizers of the families that language models use, built on the spot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS: Final = (
    "",
    " ",
    "hello world, hello again",
    " leading and  double  spaces ",
    "你好\uff0c世界 \U0001f600\U0001f469\u200d\U0001f680 naïve café\n\n\ttabs",
    "e\u0301 combining, \ufffd replacement",
    "<s> special </s> in text <|end|>",
    "<0xE4> spelled out and ▁ as well",
)
_SPECIAL: Final = ("<s>", "</s>", "<|end|>")
_WORDS: Final = ("hello", "world", "again", "hell", "lead", "ing", "and", "double", "spac", "es", "special", "text")


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it: a BPE over bytes; with an added token in plain text."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(_SPECIAL),
    )
    backend.train_from_iterator(TEXTS, trainer)
    backend.add_tokens(["plain é added", " €"])
    return _with_bos(backend)


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2 has it: ▁ for a space, <0x..> for characters outside the vocabulary."""
    vocab = _sentencepiece_vocab()
    backend = tokenizers.Tokenizer(models.BPE(vocab, _merges(vocab), byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(list(_SPECIAL))
    return _with_bos(backend)


def metaspace() -> tokenizers.Tokenizer:
    """As T5 has it: ▁ for a space, nothing for characters outside the vocabulary."""
    vocab = [(token, -float(token_id)) for token, token_id in _sentencepiece_vocab().items()]
    backend = tokenizers.Tokenizer(models.Unigram(vocab, unk_id=3, byte_fallback=False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(list(_SPECIAL))
    return _with_bos(backend)


def word_pieces() -> tokenizers.Tokenizer:
    """As BERT has it, with the clean-up of spaces before punctuation."""
    tokens = [*_SPECIAL, "[UNK]", "hello", "world", "##s", "##ing", ",", ".", "n't", "do", "'", "##é"]
    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(cleanup=True)
    backend.add_special_tokens(list(_SPECIAL))
    return backend


def save(directory: Path, backend: tokenizers.Tokenizer) -> Path:
    """Write the tokenizer as a checkpoint has it."""
    backend.save(str(directory / "tokenizer.json"))
    eos = {"__type": "AddedToken", "content": "</s>", "special": True}
    config = {"bos_token": "<s>", "eos_token": eos, "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def _sentencepiece_vocab() -> dict[str, int]:
    characters = sorted({character for text in TEXTS for character in text if character.isascii()} - {" ", "\n"})
    tokens = [*_SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁▁", "▁▁▁", *characters]
    for word in _WORDS:
        for end in range(2, len(word) + 1):
            tokens.append(word[:end])
        tokens.append("▁" + word)
    return {token: token_id for token_id, token in enumerate(dict.fromkeys(tokens))}


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for token in vocab:
        for cut in range(1, len(token)):
            if not token.startswith("<") and token[:cut] in vocab and token[cut:] in vocab:
                merges.append((token[:cut], token[cut:]))
    return merges


def _with_bos(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    bos = backend.token_to_id("<s>")
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", bos)]
    )
    return backend
