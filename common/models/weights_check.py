"""Whether a checkpoint's tensors are the model that its configuration describes, told before a byte of them is loaded.

Every tensor must be read by somebody: one that is not read means that the model computes something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from common.errors import ModelError
from common.models.checkpoint import TensorEntry, is_same_data, tensor_entries
from common.models.config import ModelConfig
from common.models.json_object import some
from common.models.tensor_shapes import EMBEDDING, HEAD, is_computed, tensor_shapes

_DTYPES: Final = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # of stored tensors, by the format's names

# What quantised checkpoints hold beside their matrices, or in their place: GPTQ, AWQ, compressed-tensors, FP8,
# bitsandbytes, mlx, ModelOpt.
_QUANTISED: Final = re.compile(
    r".*[._](qweight|qzeros|scales|g_idx|(weight|input|output|k|v|q)_scale(_inv|_2)?|weight_(packed|shape|zero_point)"
    r"|(input|output|k|v)_zero_point|SCB|weight_format|absmax|quant_map|nested_absmax|nested_quant_map|quant_state\..*)"
)
_QUANTISED_DTYPES: Final = re.compile(r"[IU](8|16|32)|F[468](_.*)?")


def check_weights(model_dir: Path, config: ModelConfig) -> None:
    """Raises `ModelError` for a tensor that is missing, is not as the configuration says, or that nobody reads."""
    entries = tensor_entries(model_dir)
    shapes = tensor_shapes(config)
    for name, entry in entries.items():
        _refuse_quantised(name, entry)
    for name, shape in shapes.items():
        check_tensor(name, entries.get(name), shape, model_dir)
    _check_unread(model_dir, entries, shapes, config)


def stored_dtype(model_dir: Path) -> str:
    """What transformers computes in where the configuration names no dtype: that of the first tensor by name."""
    entries = tensor_entries(model_dir)
    first_file = min(entry.file for entry in entries.values())
    name = min(name for name, entry in entries.items() if entry.file == first_file and entry.dtype in _DTYPES)
    return _DTYPES[entries[name].dtype]


def check_tensor(name: str, entry: TensorEntry | None, shape: tuple[int, ...], model_dir: Path) -> TensorEntry:
    """The entry, if it is there, of that shape and of a dtype that is read."""
    if entry is None:
        raise ModelError(f"tensor {name} is missing in {model_dir}, expected one of shape {list(shape)}")
    if entry.shape != shape:
        raise ModelError(f"{entry.file}: tensor {name} has shape {list(entry.shape)}, expected {list(shape)}")
    if entry.dtype not in _DTYPES:
        raise ModelError(f"{entry.file}: tensor {name} has dtype {entry.dtype}, supported are {', '.join(_DTYPES)}")
    return entry


def _refuse_quantised(name: str, entry: TensorEntry) -> None:
    if _QUANTISED.fullmatch(name) or (_QUANTISED_DTYPES.fullmatch(entry.dtype) and not is_computed(name)):
        what = f"tensor {name} has dtype {entry.dtype}"
        raise ModelError(f"{entry.file}: {what}: the checkpoint is quantised, which is not supported")


def _check_unread(
    model_dir: Path, entries: Mapping[str, TensorEntry], shapes: Mapping[str, tuple[int, ...]], config: ModelConfig
) -> None:
    unread = [name for name in entries if name not in shapes and not is_computed(name)]
    if config.tie_word_embeddings and HEAD in unread:
        if not is_same_data(entries[HEAD], entries[EMBEDDING]):
            told = f"tensor {HEAD} is not {EMBEDDING}, but {model_dir / 'config.json'} says tie_word_embeddings = True"
            raise ModelError(f"{entries[HEAD].file}: {told}: set it to false if the stored one is meant")
        unread.remove(HEAD)
    if unread:
        told = f"nothing in config.json makes {config.architecture} read {some(sorted(unread))}"
        raise ModelError(
            f"{entries[unread[0]].file}: tensor {unread[0]} of shape {list(entries[unread[0]].shape)}: {told}"
        )
