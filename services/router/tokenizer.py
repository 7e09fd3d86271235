"""Text to token ids and back, as a checkpoint's `tokenizer.json` says. Text exists in the router only.

Built on the `tokenizers` library, which releases the interpreter lock: encode long prompts in a thread.
This module knows nothing of requests, streams or chat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import tokenizers
import tokenizers.models

from common.errors import InvalidArgument, ModelError
from services.router.added_tokens import add_listed_tokens, read_listed_tokens, special_token_ids
from services.router.checkpoint_files import Json, read_json
from services.router.token_pieces import BytePieces, TextPieces, anchor, token_pieces

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
        self.special_token_ids = special_token_ids(backend, anchor(backend))
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
        config, content = read_json(directory / "tokenizer_config.json"), read_json(path)
        _refuse_clean_up(backend, config)
        listed = read_listed_tokens(directory, content)
        add_listed_tokens(backend, listed)
        backend.encode_special_tokens = bool(config.get("split_special_tokens"))
        decoder = content.get("decoder")
        if decoder is not None and not isinstance(decoder, dict):
            raise ModelError("tokenizer.json: the decoder is not an object")
        return cls(backend, token_pieces(backend, decoder), listed.roles())

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

    def special_tokens_below(self, num_ids: int) -> dict[str, int]:
        """Special tokens by their spelling, of the ids below this."""
        tokens = self._backend.get_added_tokens_decoder()
        return {tokens[token_id].content: token_id for token_id in self.special_token_ids if token_id < num_ids}

    def token_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def token(self, token_id: int) -> str | None:
        """The vocabulary's spelling of a token (`Ġthe`, `▁the`, `<0x0A>`), None for an id without one."""
        return self._backend.id_to_token(token_id)


def _load(path: Path) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library has no exception type of its own
        raise ModelError(f"{path.name} cannot be read: {error}") from error
    # Some checkpoints were saved with a training script's truncation; a server must never shorten a prompt.
    backend.no_truncation()
    backend.no_padding()
    return backend


def _refuse_clean_up(backend: tokenizers.Tokenizer, config: Json) -> None:
    """Taking spaces away before what comes next: transformers does not do it to vocabularies of BPE."""
    for_all = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    is_bpe = isinstance(backend.model, tokenizers.models.BPE)
    if config.get("clean_up_tokenization_spaces") and (not is_bpe or config.get(for_all)):
        raise ModelError("tokenizer_config.json: clean_up_tokenization_spaces = true: text cannot be streamed so")
