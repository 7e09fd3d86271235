"""The JSON files of a checkpoint directory, as they are. Knows none of their keys."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from common.errors import ModelError

Json = Mapping[str, object]


def read_json(path: Path) -> Json:
    """A JSON object, empty if there is no such file. Raises `ModelError` for anything else."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path.name} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ModelError(f"{path.name} cannot be read: it is nested too deeply") from error
    except ValueError as error:
        raise ModelError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path.name} is not a JSON object")
    return value
