"""Small trace files in Mooncake's format."""

from __future__ import annotations

import json
from pathlib import Path


def write_trace(directory: Path, *rows: dict[str, object]) -> Path:
    """A file of these rows."""
    path = directory / "trace.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def row(timestamp: int, prompt: int, ids: list[int]) -> dict[str, object]:
    """One request with two tokens of output."""
    return {"timestamp": timestamp, "input_length": prompt, "output_length": 2, "hash_ids": ids}
