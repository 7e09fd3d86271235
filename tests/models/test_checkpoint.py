"""Finding tensors in safetensors files, and the digest that tells checkpoints apart."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import ModelError
from common.models.checkpoint import MODEL_DIGEST_BYTES, checkpoint_files, model_digest, tensor_entries


def write(path: Path, shape: tuple[int, ...] = (2, 3), value: float = 0.0) -> Path:
    path.mkdir()
    (path / "config.json").write_text("{}")
    save_file({"weight": torch.full(shape, value)}, path / "model.safetensors")
    return path


def test_entries_tell_shape_and_dtype(tmp_path: Path) -> None:
    entry = tensor_entries(write(tmp_path / "a"))["weight"]
    assert (entry.shape, entry.dtype, entry.file.name) == ((2, 3), "F32", "model.safetensors")


def test_an_index_names_the_files(tmp_path: Path) -> None:
    index = {"weight_map": {"a": "2.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [file.name for file in checkpoint_files(tmp_path)] == ["1.safetensors", "2.safetensors"]


def test_the_digest_depends_on_config_shapes_and_values(tmp_path: Path) -> None:
    digest = model_digest(write(tmp_path / "a"))
    assert len(digest) == MODEL_DIGEST_BYTES
    assert model_digest(write(tmp_path / "b")) == digest
    assert model_digest(write(tmp_path / "c", shape=(3, 2))) != digest
    assert model_digest(write(tmp_path / "d", value=1.0)) != digest
    (tmp_path / "b" / "config.json").write_text('{"rope_theta": 1}')
    assert model_digest(tmp_path / "b") != digest


def test_damaged_checkpoints_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds neither"):
        checkpoint_files(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ModelError, match="cut short"):
        tensor_entries(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 32)
    with pytest.raises(ModelError, match="cut short or no safetensors"):
        tensor_entries(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match="weight_map"):
        checkpoint_files(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "model.safetensors.index.json").mkdir()
    with pytest.raises(ModelError, match=r"index\.json cannot be read: Is a directory"):
        checkpoint_files(tmp_path)


def file_of(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (file_of(json.dumps({"a": ENTRY}).encode(), bytes(7)), "7 bytes of tensors, its header describes 8"),
        (file_of(json.dumps({"a": ENTRY}).encode(), bytes(9)), "9 bytes of tensors, its header describes 8"),
        (file_of(b"{" + b"x" * 20), "header"),
        (file_of(b"\xff" * 20), "header"),
        (bytes(1024), "header"),
        (file_of(b"[]"), "header"),
        (file_of(b'{"a": 1}'), "tensor 'a'"),
        (file_of(b'{"a": {"dtype": "F32", "data_offsets": [0, 0]}}'), "tensor 'a'.*shape"),
        (file_of(b'{"a": {"dtype": "F32", "shape": [2]}}'), "tensor 'a'.*data_offsets"),
        (file_of(json.dumps({"a": ENTRY | {"shape": 2}}).encode(), bytes(8)), "tensor 'a'.*shape"),
        (file_of(json.dumps({"a": ENTRY | {"dtype": None}}).encode(), bytes(8)), "tensor 'a'.*dtype"),
    ],
)
def test_a_damaged_file_is_named_before_its_tensors_are_read(tmp_path: Path, content: bytes, named: str) -> None:
    write(tmp_path / "a")
    (tmp_path / "a" / "model.safetensors").write_bytes(content)
    for read in (tensor_entries, model_digest):
        with pytest.raises(ModelError, match=rf"model\.safetensors .*{named}"):
            read(tmp_path / "a")


def test_what_is_said_about_a_file_is_no_tensor(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": "pt"}, "a": ENTRY}).encode() + b"  "
    (tmp_path / "model.safetensors").write_bytes(file_of(header, bytes(8)))
    assert list(tensor_entries(tmp_path)) == ["a"]


@pytest.mark.parametrize("num_elements", [1_000, 1_000_000])
def test_fine_tunes_of_any_size_have_digests_of_their_own(tmp_path: Path, num_elements: int) -> None:
    before = model_digest(write(tmp_path / "before", shape=(num_elements,), value=0.5))
    assert model_digest(write(tmp_path / "after", shape=(num_elements,), value=0.25)) != before
