"""An object of a checkpoint's JSON files, read key by key; whatever is refused is told with file, key and value.

Knows JSON's types, not what a key means.
"""

from __future__ import annotations

import json
import reprlib
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common.errors import ModelError

_MAX_INTEGER: Final = 2**31 - 1  # of every count in a configuration; larger ones are no model's
_MAX_OF_TORCH: Final = 2**63 - 1  # integers that a tensor's arithmetic takes
_MAX_SHOWN: Final = 100  # characters of a value in a message
_REPR: Final = reprlib.Repr()
_REPR.maxlevel = 3  # however deeply a value is nested
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = _MAX_SHOWN


@dataclass(frozen=True, slots=True)
class JsonObject:
    """`prefix` goes before keys in messages, where the object is itself the value of a key."""

    file: str
    values: Mapping[str, object]
    prefix: str = ""

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str, default: object = None) -> object:
        return self.values.get(key, default)

    def refused(self, key: str, limit: str) -> ModelError:
        """The error for a key's value. `limit` says what is expected or supported."""
        if key not in self.values:
            return ModelError(f"{self.file}: {self.prefix}{key} is missing, {limit}")
        return ModelError(f"{self.file}: {self.prefix}{key} = {shown(self.values[key])}, {limit}")

    def positive(self, key: str, default: int | None = None, least: int = 1, most: int = _MAX_INTEGER) -> int:
        """An integer of a range. `default`: where the key is missing or null."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.refused(key, f"expected an integer from {least} to {most}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A positive number. `default`: where the key is missing; null is no number."""
        if key not in self.values and default is not None:
            return default
        value = self.values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self.refused(key, "expected a positive number")
        most = _MAX_OF_TORCH if isinstance(value, int) else sys.float_info.max
        if not 0 < value <= most:
            raise self.refused(key, f"expected a positive number up to {most}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false; false where the key is missing."""
        value = self.values.get(key, False)
        if not isinstance(value, bool):
            raise self.refused(key, "expected true or false")
        return value

    def inner(self, key: str) -> JsonObject | None:
        """The object under the key; None where there is none, or null."""
        value = self.values.get(key)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.refused(key, "expected an object or null")
        return JsonObject(self.file, value, f"{self.prefix}{key}.")


def read_json_object(path: Path) -> JsonObject:
    """Raises `ModelError` for a file that cannot be read, is not JSON in UTF-8, or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}") from error
    except RecursionError as error:
        raise ModelError(f"{path} cannot be read: it is nested too deeply") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path} is not a JSON object")
    return JsonObject(str(path), content)


def shown(value: object) -> str:
    """A value as messages show it: in one line, cut where it is long."""
    text = _REPR.repr(value)
    return text if len(text) <= _MAX_SHOWN else text[: _MAX_SHOWN - 3] + "..."


def is_same(value: object, other: object) -> bool:
    """Equal and of one type: 1 is neither true nor 1.0."""
    return type(value) is type(other) and value == other


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few names and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more
