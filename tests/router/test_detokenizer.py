"""The detokenizer: whatever the tokens and the cuts, the pieces add up to the decoding of the whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models
from transformers import PreTrainedTokenizerFast

from services.router.detokenizer import IncrementalDetokenizer
from services.router.tokenizer import Tokenizer
from tests.router.sample_tokenizers import TEXTS, byte_level, metaspace, save, sentencepiece, word_pieces


def gemma_like() -> tokenizers.Tokenizer:
    """Byte fallback without the stripping of a leading space."""
    backend = sentencepiece()
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def strips_two() -> tokenizers.Tokenizer:
    backend = sentencepiece()
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 2, 0)]
    )
    return backend


def without_decoder() -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "": 3}, unk_token="<s>"))
    backend.add_special_tokens(["<s>"])
    return backend


BUILDERS: list[Callable[[], tokenizers.Tokenizer]] = [
    byte_level,
    sentencepiece,
    gemma_like,
    strips_two,
    metaspace,
    word_pieces,
    without_decoder,
]
every_tokenizer = pytest.mark.parametrize("build", BUILDERS, ids=lambda build: build.__name__)


@cache
def load(build: Callable[[], tokenizers.Tokenizer]) -> tuple[Tokenizer, PreTrainedTokenizerFast]:
    with TemporaryDirectory() as name:
        directory = save(Path(name), build())
        return Tokenizer.from_directory(directory), PreTrainedTokenizerFast.from_pretrained(directory)


def stream(tokenizer: Tokenizer, chunks: list[list[int]], skip_special_tokens: bool = True) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens)
    return [*map(detokenizer.push, chunks), detokenizer.flush()]


@every_tokenizer
@settings(deadline=None, max_examples=200)
@given(data=st.data(), skip=st.booleans())
def test_pieces_of_any_tokens_add_up_to_the_decoding_of_all(
    build: Callable[[], tokenizers.Tokenizer], data: st.DataObject, skip: bool
) -> None:
    tokenizer, reference = load(build)
    any_id = st.integers(0, tokenizer.max_token_id + 2)
    chunks = data.draw(st.lists(st.lists(any_id, max_size=6), max_size=8))
    token_ids = [token_id for chunk in chunks for token_id in chunk]
    text = "".join(stream(tokenizer, chunks, skip))
    assert text == tokenizer.decode(token_ids, skip_special_tokens=skip)
    known = [token_id for token_id in token_ids if token_id <= tokenizer.max_token_id]
    expected = reference.decode(known, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
    assert text == expected


@pytest.mark.parametrize("build", [byte_level, sentencepiece, gemma_like], ids=lambda build: build.__name__)
@settings(deadline=None, max_examples=150)
@given(content=st.binary(max_size=40))
def test_pieces_of_any_bytes_add_up_to_the_decoding_of_all(
    build: Callable[[], tokenizers.Tokenizer], content: bytes
) -> None:
    tokenizer, _ = load(build)
    spelled = {tokenizer.pieces[i]: i for i in range(tokenizer.vocab_size)} if build is byte_level else {}
    token_ids = [
        spelled[bytes([byte])] if build is byte_level else tokenizer.token_id(f"<0x{byte:02X}>") for byte in content
    ]
    ids = [token_id for token_id in token_ids if token_id is not None]
    assert len(ids) == len(content)
    assert "".join(stream(tokenizer, [[token_id] for token_id in ids])) == tokenizer.decode(ids)


@every_tokenizer
@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=30) | st.sampled_from(TEXTS))
def test_text_that_was_encoded_streams_without_replacement_characters(
    build: Callable[[], tokenizers.Tokenizer], text: str
) -> None:
    tokenizer, _ = load(build)
    ids = tokenizer.encode(text.replace("\ufffd", ""), add_special_tokens=False)
    pieces = stream(tokenizer, [[token_id] for token_id in ids])
    assert "".join(pieces) == tokenizer.decode(ids)
    assert all("\ufffd" not in piece for piece in pieces)


@pytest.mark.parametrize("build", [byte_level, sentencepiece], ids=lambda build: build.__name__)
def test_unfinished_character_waits_and_is_replaced_at_the_end(
    build: Callable[[], tokenizers.Tokenizer],
) -> None:
    tokenizer, _ = load(build)
    if build is byte_level:
        spelled = {tokenizer.pieces[token_id]: token_id for token_id in range(tokenizer.vocab_size)}
        ids: list[int | None] = [spelled[bytes([byte])] for byte in "\U0001f47d".encode()]
    else:
        ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "\U0001f47d".encode()]
    token_ids = [token_id for token_id in ids if token_id is not None]
    assert len(token_ids) == 4
    assert "".join(stream(tokenizer, [[i] for i in token_ids])) == "\U0001f47d"
    pieces = stream(tokenizer, [[i] for i in token_ids[:3]])
    assert pieces[:3] == ["", "", ""]
    assert set(pieces[3]) == {"\ufffd"}


def test_text_that_continues_a_prompt_keeps_its_first_space() -> None:
    tokenizer, _ = load(sentencepiece)
    word = tokenizer.token_id("▁hello")
    assert word is not None
    assert IncrementalDetokenizer(tokenizer).push([word, word]) == "hello hello"
    assert IncrementalDetokenizer(tokenizer, continues_text=True).push([word, word]) == " hello hello"


def test_special_tokens_are_left_out_unless_wanted() -> None:
    tokenizer, _ = load(byte_level)
    ids = tokenizer.encode("<s>hello<|end|>", add_special_tokens=False)
    assert "".join(stream(tokenizer, [ids])) == "hello"
    assert "".join(stream(tokenizer, [ids], skip_special_tokens=False)) == "<s>hello<|end|>"
