"""The JSON files of a checkpoint directory that may be missing, as they are. Knows none of their keys."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from common.models.json_object import read_json_object

Json = Mapping[str, object]


def read_json(path: Path) -> Json:
    """A JSON object, empty if there is no such file. Raises `ModelError` for anything else."""
    return read_json_object(path).values if path.is_file() else {}
