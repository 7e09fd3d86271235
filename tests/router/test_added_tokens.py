"""Files that disagree on which tokens are special: text and ids are those of transformers, or the start is refused."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer

from common.errors import ModelError
from services.router.detokenizer import IncrementalDetokenizer
from services.router.tokenizer import Tokenizer
from tests.router.sample_tokenizers import byte_level, metaspace, save, sentencepiece

# Of tokenizer.json: special, plain, of the vocabulary alone; and not there at all.
TOKENS = ("<s>", "</s>", "<|end|>", "<|user|>", "<|think|>", "hello", "<|new|>", "<|newer|>")
ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "image_token", "boi_token")
TEXT = "hello <|user|>again</s><|think|> hello<|new|><|end|>world <|newer|>"


@pytest.fixture(scope="module", params=[byte_level, sentencepiece, metaspace], ids=lambda build: build.__name__)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    build: Callable[[], tokenizers.Tokenizer] = request.param
    backend = build()
    backend.add_tokens([tokenizers.AddedToken("<|user|>", special=False, normalized=False)])
    backend.add_tokens([tokenizers.AddedToken("<|think|>", special=True, normalized=False)])
    directory = save(tmp_path_factory.mktemp("saved"), backend)
    content = json.loads((directory / "tokenizer.json").read_text())
    assert isinstance(content, dict)
    return content


def written(source: random.Random, token: str) -> object:
    """A token as files write it: as a string, or as an object with flags."""
    if source.random() < 0.6:
        return token
    flags = {flag: source.random() < 0.3 for flag in ("lstrip", "rstrip", "normalized", "single_word")}
    return {"__type": "AddedToken", "content": token, "special": source.random() < 0.5, **flags}


def some(source: random.Random) -> list[object]:
    return [written(source, token) for token in source.sample(TOKENS, source.randint(0, 3))]


def random_files(source: random.Random, content: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """A checkpoint's files by name, with keys that contradict each other."""
    tokenizer = json.loads(json.dumps(content))
    for entry in tokenizer["added_tokens"]:
        entry["special"] ^= source.random() < 0.2
    backend = tokenizers.Tokenizer.from_str(json.dumps(tokenizer))
    config: dict[str, object] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    for role in source.sample(ROLES, source.randint(0, 4)):
        config[role] = written(source, source.choice(TOKENS))
    if source.random() < 0.3:
        config["additional_special_tokens"] = some(source)
    if source.random() < 0.3:
        config["extra_special_tokens"] = some(source)
    elif source.random() < 0.2:
        config["extra_special_tokens"] = {"audio_token": source.choice(TOKENS), "eos_token": source.choice(TOKENS)}
    if source.random() < 0.2:
        config["split_special_tokens"] = source.random() < 0.5
    if source.random() < 0.2:
        config["clean_up_tokenization_spaces"] = source.random() < 0.5
    if source.random() < 0.5:
        listed = {}
        next_id = backend.get_vocab_size()
        for token in source.sample(TOKENS, source.randint(0, 5)):
            token_id = backend.token_to_id(token)
            if token_id is None:
                token_id, next_id = next_id, next_id + 1
            flags = {flag: source.random() < 0.3 for flag in ("lstrip", "rstrip", "normalized", "special")}
            listed[str(token_id + (source.random() < 0.03))] = {"content": token, **flags}
        config["added_tokens_decoder"] = listed
    files = {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
    if source.random() < 0.4:
        named: dict[str, object] = {role: source.choice(TOKENS) for role in source.sample(ROLES, 2)}
        if source.random() < 0.3:
            named["additional_special_tokens"] = list(source.sample(TOKENS, 2))
        files["special_tokens_map.json"] = named
    if source.random() < 0.2:
        files["added_tokens.json"] = {"<|new|>": backend.get_vocab_size()}
    return files


def test_ids_and_text_are_those_of_transformers_whatever_the_files_say(
    saved: dict[str, object], tmp_path: Path
) -> None:
    source = random.Random(5)
    num_compared = 0
    for _ in range(300):
        for path in tmp_path.iterdir():
            path.unlink()
        files = random_files(source, saved)
        for name, content in files.items():
            (tmp_path / name).write_text(json.dumps(content))
        shown = json.dumps({name: content for name, content in files.items() if name != "tokenizer.json"})
        refusal = ""
        try:
            tokenizer = Tokenizer.from_directory(tmp_path)
        except ModelError as error:
            refusal = str(error)
        if refusal:
            assert "\n" not in refusal
            assert refusal.startswith(("tokenizer_config.json: ", "added_tokens.json: ")), shown
            continue
        try:
            reference = AutoTokenizer.from_pretrained(tmp_path)
        except (TypeError, ValueError, AttributeError):
            continue  # it cannot read them
        num_compared += 1
        assert tokenizer.special_tokens == reference.special_tokens_map, shown
        for add_special_tokens in (True, False):
            ids = tokenizer.encode(TEXT, add_special_tokens=add_special_tokens)
            assert ids == reference.encode(TEXT, add_special_tokens=add_special_tokens), shown
        every = [*ids, *range(tokenizer.max_token_id - 12, tokenizer.max_token_id + 1), *ids[:4]]
        for skip in (True, False):
            expected = reference.decode(every, skip_special_tokens=skip)
            assert tokenizer.decode(every, skip_special_tokens=skip) == expected, shown
            stream = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
            assert "".join(stream.push([token_id]) for token_id in every) + stream.flush() == expected, shown
    assert num_compared > 100


@pytest.mark.parametrize("is_special", [True, False])
def test_the_flags_of_the_configuration_win(tmp_path: Path, is_special: bool) -> None:
    backend = byte_level()
    backend.add_tokens([tokenizers.AddedToken("<|user|>", special=not is_special, normalized=False)])
    directory = save(tmp_path, backend)
    token_id = backend.token_to_id("<|user|>")
    assert token_id is not None
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {str(token_id): {"content": "<|user|>", "special": is_special}}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_directory(directory)
    expected = AutoTokenizer.from_pretrained(directory).decode([token_id], skip_special_tokens=True)
    assert tokenizer.decode([token_id]) == expected
    assert (token_id in tokenizer.special_token_ids) == (expected == "")


def test_a_listed_extra_token_that_is_text_stays_text(tmp_path: Path) -> None:
    backend = byte_level()
    backend.add_tokens([tokenizers.AddedToken("<|user|>", special=False, normalized=False)])
    directory = save(tmp_path, backend)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"extra_special_tokens": ["<|user|>"]}))
    tokenizer = Tokenizer.from_directory(directory)
    assert tokenizer.decode(tokenizer.encode("a<|user|>b")) == "a<|user|>b"


def test_cleaning_up_spaces_is_refused_by_name(tmp_path: Path) -> None:
    directory = save(tmp_path, metaspace())
    config = json.loads((directory / "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps(config | {"clean_up_tokenization_spaces": True}))
    with pytest.raises(ModelError, match=r"tokenizer_config.json: clean_up_tokenization_spaces = true"):
        Tokenizer.from_directory(directory)
