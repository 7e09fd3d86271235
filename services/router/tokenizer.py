"""Text to token ids and back, as a checkpoint's `tokenizer.json` says. Text exists in the router only.

Built on the `tokenizers` library, which releases the interpreter lock: encode long prompts in a thread.
This module knows nothing of requests, streams or chat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import tokenizers

from common.errors import InvalidArgument, ModelError
from services.router.checkpoint_files import Json, read_json
from services.router.token_pieces import BytePieces, TextPieces, token_pieces

_NAMED_SPECIAL: Final = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_NO_TOKENIZER: Final = "there is no tokenizer.json"
_CONVERT: Final = (
    "there is a sentencepiece tokenizer.model but no tokenizer.json; convert it once with transformers: "
    "AutoTokenizer.from_pretrained(directory, use_fast=True).save_pretrained(directory)"
)


class Tokenizer:
    """One checkpoint's tokenizer. Safe to share between threads: nothing changes after it is built."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        pieces: BytePieces | TextPieces,
        special_tokens: Mapping[str, str],
    ) -> None:
        self._backend = backend
        self.pieces = pieces
        self.special_tokens = dict(special_tokens)  # by role: {"bos_token": "<s>", ...}, as chat templates want it
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        # The largest id that has a text; a model's own vocabulary may be padded beyond it.
        self.max_token_id = max(backend.get_vocab(with_added_tokens=True).values())
        self.special_token_ids = _special_ids(backend)
        self._readings: dict[int, tuple[str, bytes]] = {}

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Read tokenizer.json and, where they exist, the configuration files beside it. Raises `ModelError`."""
        directory = Path(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            hint = _CONVERT if (directory / "tokenizer.model").is_file() else _NO_TOKENIZER
            raise ModelError(f"{directory.name}: {hint}")
        backend = _load(path)
        config = read_json(directory / "tokenizer_config.json")
        special_tokens = read_special_tokens(directory)
        _add_missing_tokens(backend, config)
        _mark_special(backend, special_tokens, config)
        decoder = read_json(path).get("decoder")
        if decoder is not None and not isinstance(decoder, dict):
            raise ModelError("tokenizer.json: the decoder is not an object")
        pieces = token_pieces(backend, decoder, _special_ids(backend))
        return cls(backend, pieces, special_tokens)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids. `add_special_tokens` lets the post-processor add BOS and the like; a rendered chat has them."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument("text", text[error.start], "must be valid Unicode") from error
        return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; ids that have no text are left out. For a stream see `detokenizer`."""
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def reading(self, token_id: int) -> tuple[str, bytes]:
        """What one token reads as behind other text, as text and as bytes; special tokens are spelled out."""
        reading = self._readings.get(token_id)
        if reading is None:
            piece = self.pieces.as_bytes(token_id)
            reading = self._readings[token_id] = (piece.decode(errors="replace"), piece)
        return reading

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of a token (`Ġthe`, `▁the`, `<0x0A>`), None for an id without one."""
        return self._backend.id_to_token(token_id)


def read_special_tokens(directory: Path) -> dict[str, str]:
    """Special tokens by role; tokenizer_config.json wins over special_tokens_map.json."""
    found: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        config = read_json(directory / name)
        for role in _NAMED_SPECIAL:
            content = _content(config.get(role))
            if content is not None:
                found[role] = content
    return found


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no exception type of its own
        raise ModelError(f"{path.name} cannot be read: {error}") from error
    # Some checkpoints were saved with a training script's truncation; a server must never shorten a prompt.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _content(token: object) -> str | None:
    """The text of a token that is written as a string or as an object with `content`."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: Json) -> None:
    """Add the tokens that tokenizer_config.json lists and tokenizer.json lacks, at the ids it gives them."""
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        return
    for token_id, entry in sorted((int(key), value) for key, value in listed.items()):
        content = _content(entry)
        if content is None or backend.token_to_id(content) is not None:
            continue
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        options = {flag: bool(entry[flag]) for flag in flags if flag in entry}
        backend.add_tokens([tokenizers.AddedToken(content, **options)])
        if backend.token_to_id(content) != token_id:
            raise ModelError(f"tokenizer_config.json: {content!r} cannot have the id {token_id}")


def _mark_special(backend: tokenizers.Tokenizer, special_tokens: Mapping[str, str], config: Json) -> None:
    """Tokens with a special role are special, whether or not tokenizer.json says so."""
    tokens = list(special_tokens.values())
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(name)
        listed = more.values() if isinstance(more, dict) else more if isinstance(more, list) else ()
        tokens += [content for content in map(_content, listed) if content is not None]
    known = {added.content for added in backend.get_added_tokens_decoder().values() if added.special}
    for token in tokens:
        if token not in known and backend.token_to_id(token) is not None:
            backend.add_special_tokens([tokenizers.AddedToken(token, special=True, normalized=False)])


def _special_ids(backend: tokenizers.Tokenizer) -> frozenset[int]:
    return frozenset(i for i, added in backend.get_added_tokens_decoder().items() if added.special)
