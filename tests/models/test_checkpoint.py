"""Finding tensors in safetensors files, and the digest that tells checkpoints apart."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from common.errors import ModelError
from common.models.checkpoint import MODEL_DIGEST_BYTES, is_same_data, model_digest, tensor_entries
from common.models.checkpoint_files import checkpoint_files, holds_weights


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
    for content in ("{}", '{"weight_map": []}', '{"weight_map": {}}'):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ModelError, match=r"index\.json holds no weight_map"):
            checkpoint_files(tmp_path)
    for content, named in (("[]", "is not a JSON object"), ("[" * 100_000, "nested too deeply"), ("{", "is not JSON")):
        (tmp_path / "model.safetensors.index.json").write_text(content)
        with pytest.raises(ModelError, match=rf"index\.json .*{named}"):
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
        (file_of(b'{"a": ' + b"[" * 100_000), "header"),
        (file_of(b'{"a": 1}'), "tensor 'a'"),
        (file_of(b'{"a": {"dtype": "F32", "data_offsets": [0, 0]}}'), "tensor 'a'.*shape"),
        (file_of(b'{"a": {"dtype": "F32", "shape": [2]}}'), "tensor 'a'.*data_offsets"),
        (file_of(json.dumps({"a": ENTRY | {"shape": 2}}).encode(), bytes(8)), "tensor 'a'.*shape"),
        (
            file_of(json.dumps({"a": ENTRY | {"shape": [3]}}).encode(), bytes(8)),
            r"damaged: tensor a: .*\[3\] do not fit",
        ),
        (file_of(json.dumps({"a": ENTRY | {"shape": [-1, -2]}}).encode(), bytes(8)), "damaged: tensor a: .*do not fit"),
        (file_of(json.dumps({"a": ENTRY, "b": ENTRY}).encode(), bytes(8)), "damaged: tensor b begins at byte 0 .*8"),
        (file_of(json.dumps({"a": ENTRY | {"data_offsets": [8, 16]}}).encode(), bytes(16)), "damaged: tensor a begins"),
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


def write_index(path: Path, weight_map: dict[str, object]) -> None:
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def test_a_single_file_beside_the_index_of_another_save_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    save_file({"weight": torch.ones(2, 3)}, path / "model-00001-of-00001.safetensors")
    write_index(path, {"weight": "model-00001-of-00001.safetensors"})
    for read in (tensor_entries, model_digest):
        with pytest.raises(ModelError, match=r"model\.safetensors lies beside .*index\.json, which names model-00001"):
            read(path)
    write_index(path, {"weight": "model.safetensors"})  # they agree
    assert [entry.file.name for entry in tensor_entries(path).values()] == ["model.safetensors"]


@pytest.mark.parametrize(
    "file", ["../model.safetensors", "/model.safetensors", "model.bin", 1, None, ["a.safetensors"]]
)
def test_an_index_names_safetensors_files_beside_it(tmp_path: Path, file: object) -> None:
    write_index(tmp_path, {"weight": file})
    with pytest.raises(ModelError, match=r"index\.json: weight_map\.weight = "):
        checkpoint_files(tmp_path)


def test_a_tensor_is_in_one_file_and_where_the_index_says(tmp_path: Path) -> None:
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"weight": torch.ones(2), name: torch.ones(1)}, tmp_path / name)
    write_index(tmp_path, {"weight": "1.safetensors", "2.safetensors": "2.safetensors"})
    with pytest.raises(ModelError, match=r"2\.safetensors: tensor weight is in 1\.safetensors as well"):
        tensor_entries(tmp_path)
    save_file({"other": torch.ones(2)}, tmp_path / "2.safetensors")
    write_index(tmp_path, {"weight": "1.safetensors", "other": "1.safetensors", "third": "2.safetensors"})
    with pytest.raises(ModelError, match=r"weight_map\.other = '1\.safetensors', which does not hold it"):
        tensor_entries(tmp_path)


def test_a_tensor_that_the_index_names_and_no_file_holds_is_not_there(tmp_path: Path) -> None:
    save_file({"weight": torch.ones(2)}, tmp_path / "1.safetensors")
    write_index(tmp_path, {"weight": "1.safetensors", "lm_head.weight": "1.safetensors"})
    assert list(tensor_entries(tmp_path)) == ["weight"]


@pytest.mark.parametrize(
    ("file", "said"),
    [
        ("pytorch_model.bin", "a pickle"),
        ("consolidated.safetensors", "the makers' own format"),
        ("model.gguf", "a GGUF file"),
    ],
)
def test_weights_in_another_format_are_named(tmp_path: Path, file: str, said: str) -> None:
    assert not holds_weights(tmp_path)
    (tmp_path / file).write_bytes(b"")
    assert holds_weights(tmp_path)
    with pytest.raises(ModelError, match=rf"holds neither .*; {file} is .*{said}"):
        checkpoint_files(tmp_path)


def test_the_json_files_of_a_checkpoint_are_no_weights(tmp_path: Path) -> None:
    write_index(tmp_path, {"weight": "model-00001-of-00001.safetensors"})
    for name in ("config.json", "params.json", "consolidated.safetensors.index.json", "pytorch_model.bin.index.json"):
        (tmp_path / name).write_text("{}")
    assert not holds_weights(tmp_path)  # as `*.json` of a public model is, which is all that a router needs
    save_file({"weight": torch.ones(2)}, tmp_path / "model-00001-of-00001.safetensors")
    assert holds_weights(tmp_path)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a")
    (path / "params.json").write_text("{}")  # Mistral ships both formats in one directory
    assert checkpoint_files(path) == [path / "model.safetensors"]
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"adapter_config\.json: an adapter \(LoRA\) lies beside the weights"):
        checkpoint_files(path)


def test_data_are_compared_to_the_last_byte(tmp_path: Path) -> None:
    large = torch.zeros(600_000)
    other = large.clone()
    other[-1] = 1.0
    save_file(
        {"a": large, "b": large.clone(), "c": other, "d": large.reshape(2, -1).clone()}, tmp_path / "model.safetensors"
    )
    entries = tensor_entries(tmp_path)
    assert is_same_data(entries["a"], entries["b"])
    assert not is_same_data(entries["a"], entries["c"])
    assert not is_same_data(entries["a"], entries["d"])
