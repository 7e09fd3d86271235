"""What one token contributes to the text, derived from a tokenizer's decoder and cached per token.

Two families cover the decoders of language models. In a byte-level one (GPT-2, Llama 3, Qwen) a token is a
string of bytes. In the others (sentencepiece with or without byte fallback, word pieces) a token is a
string of characters, which differs at the very start of the text, except that runs of `<0x..>` tokens are
bytes and are decoded as a whole. Decoders whose output depends on later tokens are refused. This module
knows nothing of streams.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final

import tokenizers

from common.errors import ModelError

Json = Mapping[str, object]

_BYTE_TOKEN: Final = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_PER_TOKEN: Final = frozenset({"Replace", "ByteFallback", "Metaspace", "WordPiece", "Strip"})


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable alphabet of bytes: printable Latin-1 stands for itself, the rest for U+0100 and on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return alphabet


_BYTE_OF: Final = _byte_alphabet()


class BytePieces:
    """The bytes of each token of a byte-level vocabulary."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._cache: dict[int, bytes] = {}

    def __getitem__(self, token_id: int) -> bytes:
        piece = self._cache.get(token_id)
        if piece is None:
            piece = self._cache[token_id] = _token_bytes(self._backend.id_to_token(token_id) or "")
        return piece

    def as_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text as bytes; nothing for an id without a token."""
        return self[token_id]


class TextPieces:
    """The characters of each token of any other vocabulary, anywhere but at the start of the text."""

    def __init__(self, backend: tokenizers.Tokenizer, has_byte_fallback: bool) -> None:
        self._backend = backend
        self._has_byte_fallback = has_byte_fallback
        self._anchor = anchor(backend)
        self._anchor_text = backend.decode([self._anchor], skip_special_tokens=False)
        self._cache: dict[int, str | None] = {}

    def __getitem__(self, token_id: int) -> str | None:
        """The text of a token, None for a byte token, whose text depends on its neighbours."""
        try:
            return self._cache[token_id]
        except KeyError:
            is_byte = self._has_byte_fallback and _is_byte_token(self._backend.id_to_token(token_id))
            piece = self._cache[token_id] = None if is_byte else self.within([token_id])
            return piece

    def as_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text as bytes; nothing for an id without a token."""
        piece = self[token_id]
        if piece is not None:
            return piece.encode()
        return bytes.fromhex((self._backend.id_to_token(token_id) or "")[3:5])

    def exists(self, token_id: int) -> bool:
        return self._backend.id_to_token(token_id) is not None

    def within(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens where other text goes before them."""
        text = self._backend.decode([self._anchor, *token_ids], skip_special_tokens=False)
        assert text.startswith(self._anchor_text)
        return text[len(self._anchor_text) :]

    def at_start(self, token_ids: Sequence[int]) -> str:
        """The text of these tokens where nothing goes before them."""
        return self._backend.decode(list(token_ids), skip_special_tokens=False)


def token_pieces(backend: tokenizers.Tokenizer, decoder: Json | None) -> BytePieces | TextPieces:
    """Choose the family by the `decoder` of tokenizer.json. Raises `ModelError` for one that is in neither."""
    steps = _steps(decoder)
    kinds = [str(step.get("type")) for step in steps]
    if kinds == ["ByteLevel"]:
        return BytePieces(backend)
    fuse = kinds.index("Fuse") if "Fuse" in kinds else len(kinds)
    for kind in kinds[:fuse]:
        if kind not in _PER_TOKEN:
            raise ModelError(f"tokenizer.json: decoder {kind} cannot be streamed")
    for step in steps[fuse + 1 :]:
        if step.get("type") != "Strip" or step.get("stop"):
            raise ModelError(f"tokenizer.json: decoder {step.get('type')} after Fuse cannot be streamed")
    return TextPieces(backend, "ByteFallback" in kinds)


def _steps(decoder: Json | None) -> list[Json]:
    if decoder is None:
        return []
    if decoder.get("type") != "Sequence":
        return [decoder]
    inner = decoder.get("decoders")
    if not isinstance(inner, list):
        raise ModelError("tokenizer.json: a Sequence decoder without decoders")
    return [step for nested in inner for step in _steps(nested)]


def _token_bytes(token: str) -> bytes:
    """Tokens outside the byte alphabet were added as plain text."""
    try:
        return bytes([_BYTE_OF[character] for character in token])
    except KeyError:
        return token.encode()


def _is_byte_token(token: str | None) -> bool:
    return token is not None and _BYTE_TOKEN.fullmatch(token) is not None


def anchor(backend: tokenizers.Tokenizer) -> int:
    """A token with a text of its own, to decode others behind it."""
    added = backend.get_added_tokens_decoder().keys()
    vocab = backend.get_vocab(with_added_tokens=False)
    words = (token_id for token, token_id in vocab.items() if token.isalnum() and token_id not in added)
    found = min(words, default=None)
    if found is None:
        raise ModelError("tokenizer.json: the vocabulary has no word")
    return found
