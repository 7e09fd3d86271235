"""Which safetensors files of a directory are the model's weights, as transformers would choose; doubts are refused.

Knows no tensors but by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from common.errors import ModelError
from common.models.foreign_formats import adapter_file, foreign_format, holds_foreign_weights
from common.models.json_object import read_json_object, shown, some

INDEX_FILE: Final = "model.safetensors.index.json"
SINGLE_FILE: Final = "model.safetensors"


def holds_weights(model_dir: Path) -> bool:
    """Whether there are weights of any format, ours or not. JSON files hold none: a router needs no others. Raises
    `ModelError` for an index that is none."""
    ours = {SINGLE_FILE, *indexed_tensors(model_dir).values()}
    return any((model_dir / name).exists() for name in ours) or holds_foreign_weights(model_dir)


def checkpoint_files(model_dir: Path) -> list[Path]:
    """The safetensors files, sorted: the single file, or those of the index.

    Raises `ModelError` if there are none, or if it takes a rule to tell which of them are meant.
    """
    if (adapter := adapter_file(model_dir)) is not None:
        raise ModelError(f"{adapter}: an adapter (LoRA) lies beside the weights: merge it into them, or take it away")
    files = {model_dir / name for name in indexed_tensors(model_dir).values()}
    single = model_dir / SINGLE_FILE
    if files:
        if single.exists() and files != {single}:
            others = some(sorted(file.name for file in files))
            raise ModelError(f"{single} lies beside {INDEX_FILE}, which names {others}: take away the older save")
        return sorted(files)
    if not single.exists():
        found = foreign_format(model_dir)
        raise ModelError(f"{model_dir} holds neither {SINGLE_FILE} nor {INDEX_FILE}" + (f"; {found}" if found else ""))
    return [single]


def indexed_tensors(model_dir: Path) -> Mapping[str, str]:
    """The index's tensors and the names of their files; nothing if there is no index."""
    path = model_dir / INDEX_FILE
    if not path.exists():
        return {}
    index = read_json_object(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{path} holds no weight_map")
    for tensor, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or Path(file).name != file:
            raise ModelError(f"{path}: weight_map.{tensor} = {shown(file)}, expected a safetensors file beside it")
    return weight_map
