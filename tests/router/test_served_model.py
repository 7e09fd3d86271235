"""What the router takes from a checkpoint: what it can serve it serves, and what it cannot it tells at the start."""

from __future__ import annotations

import json
import logging
import struct
from pathlib import Path

import pytest
from baton.v1 import inference_pb2

from common.errors import InvalidArgument, ModelError
from services.router.served_model import ServedModel, load_served_model
from services.router.validation import validate
from tests.router.byte_checkpoint import USER_TOKEN_ID, byte_ids, write_byte_checkpoint


def load(directory: Path, **config: object) -> ServedModel:
    """The checkpoint of bytes with other values in its config.json."""
    write_byte_checkpoint(directory)
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return load_served_model("bytes", directory, 1 << 20)


def text_request(text: str) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(text=text)


def chat_request(content: str) -> inference_pb2.GenerateRequest:
    message = inference_pb2.ChatMessage(role="user", content=content)
    return inference_pb2.GenerateRequest(chat=inference_pb2.ChatMessages(messages=[message]))


@pytest.mark.parametrize(
    ("request_of", "field"), [(text_request, "text"), (chat_request, "chat.messages")], ids=["text", "chat"]
)
async def test_a_token_beyond_the_embedding_is_refused_under_the_field_that_holds_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, request_of: object, field: str
) -> None:
    assert callable(request_of)
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path, vocab_size=USER_TOKEN_ID)
    assert [record.getMessage() for record in caplog.records] == [
        "1 ids of the tokenizer are beyond the 257 embeddings of the model, and prompts with one are refused: '<user>'"
    ]
    with pytest.raises(InvalidArgument, match="'<user>': a token that the model has no embedding for") as caught:
        await model.prompt_ids(validate(request_of("a<user>b"), model.limits))
    assert caught.value.field == field
    await model.chats.aclose()
    assert await model.prompt_ids(validate(text_request("ab"), model.limits)) == byte_ids("ab")


def test_an_end_token_of_the_tokenizer_beyond_the_embedding_ends_nothing(tmp_path: Path) -> None:
    load(tmp_path, vocab_size=USER_TOKEN_ID, eos_token_id=7)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token": "<user>"}))
    assert load_served_model("bytes", tmp_path, 1 << 20).limits.eos_token_ids == (7,)


async def test_a_tokenizer_within_the_embedding_is_not_spoken_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        model = load(tmp_path)
    assert not caplog.records
    assert USER_TOKEN_ID in await model.prompt_ids(validate(text_request("a<user>b"), model.limits))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for message in %}", "chat template 'default' does not compile: Expected an expression"),
        ("{{ messages | nothing }}", "chat template 'default' does not compile: No filter named 'nothing'"),
        (7, "tokenizer_config.json: chat_template is neither a string nor a list"),
    ],
)
async def test_a_broken_chat_template_refuses_chats_and_serves_texts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, template: object, reason: str
) -> None:
    load(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    with caplog.at_level(logging.ERROR):
        model = load_served_model("bytes", tmp_path, 1 << 20)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 1
    assert told[0].startswith(f"chats are refused: {reason}")
    assert not model.limits.has_chat_template
    with pytest.raises(ModelError, match=f"the checkpoint's chat template is broken: {reason}"):
        validate(chat_request("hello"), model.limits)
    assert await model.prompt_ids(validate(text_request("ab"), model.limits)) == byte_ids("ab")


def test_a_checkpoint_that_workers_would_refuse_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json: is_causal = False"):
        load(tmp_path, is_causal=False)
    assert load(tmp_path).digests == frozenset()  # it holds no weights: nothing is to be compared
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"holds neither model\.safetensors .*pytorch_model\.bin is a pickle"):
        load(tmp_path)
    header = b'{"lm_head.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ModelError, match=r"tensor model\.embed_tokens\.weight is missing"):
        load(tmp_path)


@pytest.mark.parametrize(
    "file", ["config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json", "added_tokens.json"]
)
@pytest.mark.parametrize("content", ['{"x": ' + "[" * 100_000, '{"x": ' + "9" * 5000 + "}", "[1]"])
def test_a_file_that_cannot_be_read_is_told_in_one_line(tmp_path: Path, file: str, content: str) -> None:
    load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()  # with it, not all of the others are read
    (tmp_path / file).write_text(content)
    with pytest.raises(ModelError, match=file.replace(".", r"\.")) as error:
        load_served_model("bytes", tmp_path, 1 << 20)
    assert "\n" not in str(error.value)
