"""Reading a checkpoint's tokenizer: the same ids as transformers, and typed errors for what cannot be read."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from common.errors import InvalidArgument, ModelError
from services.router.tokenizer import Tokenizer
from tests.router.sample_tokenizers import TEXTS, byte_level, metaspace, save, sentencepiece


@pytest.fixture(params=["byte_level", "sentencepiece", "metaspace"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    backend = {"byte_level": byte_level, "sentencepiece": sentencepiece, "metaspace": metaspace}[request.param]()
    return save(tmp_path, backend)


@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_ids_and_text_are_those_of_transformers(directory: Path, add_special_tokens: bool) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    reference = PreTrainedTokenizerFast.from_pretrained(directory)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=add_special_tokens)
        assert ids == reference.encode(text, add_special_tokens=add_special_tokens)
        for skip in (True, False):
            expected = reference.decode(ids, skip_special_tokens=skip, clean_up_tokenization_spaces=False)
            assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


def test_post_processor_adds_bos_only_if_asked(directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    bos = tokenizer.token_id("<s>")
    assert tokenizer.encode("hello")[0] == bos
    assert bos not in tokenizer.encode("hello", add_special_tokens=False)


def test_sizes_ids_and_special_tokens_are_known(directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.token(tokenizer.max_token_id) is not None
    assert tokenizer.token(tokenizer.max_token_id + 1) is None
    assert tokenizer.vocab_size == tokenizer.max_token_id + 1
    assert {tokenizer.token(token_id) for token_id in tokenizer.special_token_ids} == {"<s>", "</s>", "<|end|>"}
    assert tokenizer.special_tokens == {"bos_token": "<s>", "eos_token": "</s>"}


def test_saved_truncation_does_not_shorten_a_prompt(tmp_path: Path) -> None:
    backend = byte_level()
    backend.enable_truncation(4)
    backend.enable_padding(length=16)
    tokenizer = Tokenizer.from_directory(save(tmp_path, backend))
    assert tokenizer.decode(tokenizer.encode("one two three four five")) == "one two three four five"
    assert len(tokenizer.encode("a")) == 2


def test_tokens_listed_beside_tokenizer_json_are_added_at_their_ids(tmp_path: Path) -> None:
    directory = save(tmp_path, byte_level())
    next_id = Tokenizer.from_directory(directory).vocab_size
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(next_id): {"content": "<|tool|>", "special": True}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.encode("<|tool|>", add_special_tokens=False) == [next_id]
    assert next_id in tokenizer.special_token_ids
    config["added_tokens_decoder"] = {str(next_id + 3): {"content": "<|tool|>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=str(next_id + 3)):
        Tokenizer.from_directory(directory)


def test_threads_share_a_tokenizer(directory: Path) -> None:
    tokenizer = Tokenizer.from_directory(directory)
    texts = [text * 50 for text in TEXTS]
    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == [tokenizer.encode(text) for text in texts]


def test_text_that_is_not_unicode_is_refused(directory: Path) -> None:
    with pytest.raises(InvalidArgument, match="Unicode"):
        Tokenizer.from_directory(directory).encode("a\ud800")


def test_sentencepiece_model_alone_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(ModelError, match="save_pretrained"):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": "{"}, "tokenizer.json cannot be read"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json is not JSON"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json is not a JSON object"),
    ],
)
def test_file_that_cannot_be_read_is_an_error_of_the_model(tmp_path: Path, files: dict[str, str], message: str) -> None:
    if files:
        save(tmp_path, byte_level())
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=message):
        Tokenizer.from_directory(tmp_path)


@pytest.mark.parametrize(
    "decoder",
    [
        {"type": "CTC", "pad_token": "<pad>", "word_delimiter_token": "|", "cleanup": True},
        {"type": "BPEDecoder", "suffix": "</w>"},
        {"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 0, "stop": 1}]},
    ],
)
def test_decoder_that_looks_ahead_is_refused(tmp_path: Path, decoder: dict[str, object]) -> None:
    directory = save(tmp_path, byte_level())
    content = json.loads((directory / "tokenizer.json").read_text())
    content["decoder"] = decoder
    (directory / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match="cannot be streamed"):
        Tokenizer.from_directory(directory)
