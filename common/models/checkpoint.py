"""The tensors of a Hugging Face checkpoint: which file holds which, where and how, and a digest of it all.

Reads headers, and of tensor data only samples for the digest. Knows neither torch nor what the tensors are for.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

import msgspec

from common.errors import ModelError
from common.models.checkpoint_files import INDEX_FILE, checkpoint_files, indexed_tensors

MODEL_DIGEST_BYTES: Final = 16
_NUM_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 4096
_PIECE_BYTES: Final = 1 << 20
_LENGTH_BYTES: Final = 8  # before the header
_ITEM_BYTES: Final = {  # of dtypes whose items are whole bytes
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_MAX_HEADER_BYTES: Final = 100_000_000  # the limit of the format itself


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies and what it looks like."""

    file: Path
    shape: tuple[int, ...]
    dtype: str  # the format's name: F32, BF16, F16...
    start: int  # in the file, bytes
    num_bytes: int


def tensor_entries(model_dir: Path) -> dict[str, TensorEntry]:
    """Every tensor of the checkpoint by name.

    Raises `ModelError` for a missing or damaged file, a tensor that is in two files, and one that is in another file
    than the index says. What the index names and no file holds is simply not there: conversions leave tied copies out.
    """
    entries: dict[str, TensorEntry] = {}
    for file in checkpoint_files(model_dir):
        header = _read_header(file)
        for name, described in header.tensors.items():
            if name in entries:
                raise ModelError(f"{file}: tensor {name} is in {entries[name].file.name} as well")
            begin, end = described.data_offsets
            entries[name] = TensorEntry(file, described.shape, described.dtype, header.num_bytes + begin, end - begin)
    for name, file_name in indexed_tensors(model_dir).items():
        if name in entries and entries[name].file.name != file_name:
            raise ModelError(f"{model_dir / INDEX_FILE}: weight_map.{name} = {file_name!r}, which does not hold it")
    return entries


def is_same_data(one: TensorEntry, other: TensorEntry) -> bool:
    """Whether two tensors agree in dtype, shape and every byte. Reads both, up to where they differ."""
    if (one.dtype, one.shape, one.num_bytes) != (other.dtype, other.shape, other.num_bytes):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        left = one.num_bytes
        while left > 0:
            piece = first.read(min(left, _PIECE_BYTES))
            if not piece or piece != second.read(len(piece)):
                return False
            left -= len(piece)
    return True


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

    @property
    def num_bytes(self) -> int:
        """Up to where the tensors begin."""
        return _LENGTH_BYTES + len(self.encoded)


def _read_header(file: Path) -> _Header:
    """8 bytes of length, little-endian, then JSON. Raises `ModelError` for a file that is not what its header says."""
    try:
        with file.open("rb") as stream:
            (num_bytes,) = struct.unpack("<Q", stream.read(_LENGTH_BYTES))
            encoded = stream.read(num_bytes) if num_bytes <= _MAX_HEADER_BYTES else b""
        size = file.stat().st_size
    except (OSError, struct.error) as error:
        raise ModelError(f"{file} is missing or cut short") from error
    if len(encoded) != num_bytes:
        raise ModelError(f"{file} is cut short or no safetensors file")
    tensors = _parse_header(file, encoded)
    found = size - _LENGTH_BYTES - num_bytes
    described = max((tensor.data_offsets[1] for tensor in tensors.values()), default=0)
    if found != described:
        raise ModelError(f"{file} holds {found} bytes of tensors, its header describes {described}")
    _check_places(file, tensors)
    return _Header(encoded, tensors)


def _check_places(file: Path, tensors: Mapping[str, _Described]) -> None:
    """As the format wants them: one behind the other, each of the size that its shape and dtype make."""
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        begin, stop = tensor.data_offsets
        num_bytes = math.prod(tensor.shape) * _ITEM_BYTES.get(tensor.dtype, 0)
        if min(tensor.shape, default=0) < 0 or (tensor.dtype in _ITEM_BYTES and stop - begin != num_bytes):
            told = f"dtype {tensor.dtype} and shape {list(tensor.shape)} do not fit its {stop - begin} bytes"
            raise ModelError(f"{file} is damaged: tensor {name}: {told}")
        if begin != end:
            raise ModelError(f"{file} is damaged: tensor {name} begins at byte {begin} of the tensors, expected {end}")
        end = stop


def _parse_header(file: Path, encoded: bytes) -> dict[str, _Described]:
    try:
        parts = msgspec.json.decode(encoded, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ModelError(f"{file} has a header that cannot be read: {error}") from error
    parts.pop("__metadata__", None)
    tensors = {}
    for name, part in parts.items():
        try:
            tensors[name] = msgspec.json.decode(part, type=_Described)
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ModelError(f"{file} has a header that cannot be read: tensor {name!r}: {error}") from error
    return tensors
