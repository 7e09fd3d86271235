"""The files of a Hugging Face checkpoint: which safetensors file holds which tensor, and a digest of it all.

Reads headers, and of tensor data only samples for the digest. Knows neither torch nor what the tensors are for.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

import msgspec

from common.errors import ModelError

MODEL_DIGEST_BYTES: Final = 16
_INDEX: Final = "model.safetensors.index.json"
_SINGLE: Final = "model.safetensors"
_NUM_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096
_MAX_HEADER_BYTES: Final = 100_000_000  # the limit of the format itself


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies and what it looks like."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # the format's name: F32, BF16, F16...


def tensor_entries(model_dir: Path) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint by name. Raises `ModelError` for a missing or damaged file."""
    entries: dict[str, TensorEntry] = {}
    for file in checkpoint_files(model_dir):
        for name, described in _read_header(file).tensors.items():
            entries[name] = TensorEntry(file, described.shape, described.dtype)
    return entries


def checkpoint_files(model_dir: Path) -> list[Path]:
    """The safetensors files, sorted: those of the index if there is one, else the single file."""
    index = model_dir / _INDEX
    if index.exists():
        try:
            weight_map = json.loads(index.read_bytes())["weight_map"]
            return [model_dir / name for name in sorted(set(weight_map.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} holds no weight_map") from error
        except OSError as error:
            raise ModelError(f"{index} cannot be read: {error.strerror}") from error
    if not (model_dir / _SINGLE).exists():
        raise ModelError(f"{model_dir} holds neither {_SINGLE} nor {_INDEX}")
    return [model_dir / _SINGLE]


def model_digest(model_dir: Path) -> bytes:
    """16 bytes that two workers must share: config.json; name, size, header and samples of every safetensors file.

    Cheap: of the tensors only evenly spread samples are read, 256 KiB a file. That tells fine-tunes of one model apart,
    whose values differ nearly everywhere; it is no guard against one that was made to look alike. Raises `ModelError`
    for a file that is missing, cut short, or has a damaged header.
    """
    digest = blake2b(digest_size=MODEL_DIGEST_BYTES)
    _absorb(digest, (model_dir / "config.json").read_bytes())
    for file in checkpoint_files(model_dir):
        header = _read_header(file).encoded
        _absorb(digest, file.name.encode())
        _absorb(digest, struct.pack("<Q", file.stat().st_size))
        _absorb(digest, header)
        _absorb(digest, _samples(file))
    return digest.digest()


def drawn_model_digest(model_dir: Path) -> bytes:
    """16 bytes for the model of that shape whose weights are drawn (`common.models.random_weights`)."""
    digest = blake2b(digest_size=MODEL_DIGEST_BYTES)
    _absorb(digest, (model_dir / "config.json").read_bytes())
    _absorb(digest, b"random weights")
    return digest.digest()


def _samples(file: Path) -> bytes:
    """Pieces of the file at even distances, its last bytes included; a small file whole."""
    size = file.stat().st_size
    if size <= _NUM_SAMPLES * _SAMPLE_BYTES:
        return file.read_bytes()
    with file.open("rb") as stream:
        pieces = []
        for index in range(_NUM_SAMPLES):
            stream.seek((size - _SAMPLE_BYTES) * index // (_NUM_SAMPLES - 1))
            pieces.append(stream.read(_SAMPLE_BYTES))
    return b"".join(pieces)


def _absorb(digest: blake2b, part: bytes) -> None:
    """Length first, so that no two lists of parts read the same."""
    digest.update(struct.pack("<Q", len(part)))
    digest.update(part)


class _Described(msgspec.Struct, frozen=True):
    """A tensor in a header. `data_offsets`: where it begins and ends behind the header, bytes."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


@dataclass(frozen=True, slots=True)
class _Header:
    """A safetensors file's header, as it is stored and what it says."""

    encoded: bytes
    tensors: dict[str, _Described]


def _read_header(file: Path) -> _Header:
    """8 bytes of length, little-endian, then JSON. Raises `ModelError` for a file that is not what its header says."""
    try:
        with file.open("rb") as stream:
            (num_bytes,) = struct.unpack("<Q", stream.read(8))
            encoded = stream.read(num_bytes) if num_bytes <= _MAX_HEADER_BYTES else b""
        size = file.stat().st_size
    except (OSError, struct.error) as error:
        raise ModelError(f"{file} is missing or cut short") from error
    if len(encoded) != num_bytes:
        raise ModelError(f"{file} is cut short or no safetensors file")
    tensors = _parse_header(file, encoded)
    found = size - 8 - num_bytes
    described = max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if found != described:
        raise ModelError(f"{file} holds {found} bytes of tensors, its header describes {described}")
    return _Header(encoded, tensors)


def _parse_header(file: Path, encoded: bytes) -> dict[str, _Described]:
    try:
        parts = msgspec.json.decode(encoded, type=dict[str, msgspec.Raw])
    except msgspec.MsgspecError as error:
        raise ModelError(f"{file} has a header that cannot be read: {error}") from error
    parts.pop("__metadata__", None)
    tensors = {}
    for name, part in parts.items():
        try:
            tensors[name] = msgspec.json.decode(part, type=_Described)
        except msgspec.MsgspecError as error:
            raise ModelError(f"{file} has a header that cannot be read: tensor {name!r}: {error}") from error
    return tensors
