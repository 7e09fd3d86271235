"""Traces of real traffic: who asked when, how long prompt and output were, which prefixes were shared. Pure parsing.

Two published formats: Mooncake's JSONL (`timestamp` in ms, `input_length`, `output_length`, `hash_ids` with one id for
each started block of 512 prompt tokens) and Azure's CSV (`TIMESTAMP`, `ContextTokens`, `GeneratedTokens`). A malformed
row is an `InvalidArgument` that names file, line and field. Scales nothing.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import groupby, pairwise
from pathlib import Path

import msgspec

from common.errors import InvalidArgument

BLOCK_TOKENS = 512  # prompt tokens that one of Mooncake's hash ids stands for
MAX_TOKENS = 10_000_000  # more than any context; a row beyond it is no request


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request of a trace."""

    at_s: float  # since the trace's first row
    num_prompt_tokens: int
    num_output_tokens: int
    block_ids: tuple[int, ...] = ()  # equal ids: equal blocks of the prompt, and equal ones before them
    is_spread: bool = False  # the file has the same timestamp for other rows


@dataclass(frozen=True, slots=True)
class Trace:
    """Rows of one file in order of time; no two of them are due at the same moment."""

    name: str
    first_row: int  # of the file, counted from 0
    rows: tuple[TraceRow, ...]

    @property
    def num_spread(self) -> int:
        """Rows that shared a timestamp and were spread."""
        return sum(row.is_spread for row in self.rows)

    def select(self, first_row: int, num_rows: int | None) -> Trace:
        """`num_rows` rows (None: all) from `first_row` on; the first of them is due at 0."""
        if not 0 <= first_row < len(self.rows):
            raise InvalidArgument("first row", first_row, f"0 to {len(self.rows) - 1} ({self.name})")
        left = len(self.rows) - first_row
        if num_rows is not None and not 1 <= num_rows <= left:
            raise InvalidArgument("rows", num_rows, f"1 to {left} from row {first_row} on ({self.name})")
        rows = self.rows[first_row : None if num_rows is None else first_row + num_rows]
        return Trace(self.name, self.first_row + first_row, _from_zero(rows))


class _MooncakeRow(msgspec.Struct):
    timestamp: float
    input_length: int
    output_length: int
    hash_ids: tuple[int, ...]


def read_trace(path: Path, trace_format: str | None = None) -> Trace:
    """Read a whole file. The format is one of FORMATS; without one the file's extension says it."""
    trace_format = trace_format or {".jsonl": "mooncake", ".csv": "azure"}.get(path.suffix.lower())
    if trace_format not in FORMATS:
        raise InvalidArgument("trace format", trace_format or path.name, f"one of {', '.join(FORMATS)}")
    try:
        with path.open(encoding="utf-8-sig", newline="") as lines:
            return FORMATS[trace_format](path.name, lines)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgument("trace", str(path), f"cannot be read: {error}") from error


def parse_mooncake(name: str, lines: Iterable[str]) -> Trace:
    """Mooncake's JSONL: one object a line."""
    rows = []
    decoder = msgspec.json.Decoder(_MooncakeRow)
    for number, line in enumerate(lines, start=1):
        try:
            row = decoder.decode(line)
        except msgspec.ValidationError as error:
            raise InvalidArgument(f"{name}, line {number}", line.strip(), str(error)) from error
        except msgspec.DecodeError as error:
            raise InvalidArgument(f"{name}, line {number}", line.strip(), f"not JSON: {error}") from error
        _check_length(name, number, "input_length", row.input_length)
        _check_length(name, number, "output_length", row.output_length)
        num_blocks = -(-row.input_length // BLOCK_TOKENS)
        fits = len(row.hash_ids) == num_blocks and min(row.hash_ids) >= 0
        limit = f"{num_blocks} ids, none negative ({row.input_length} tokens in blocks of {BLOCK_TOKENS})"
        _check(name, number, "hash_ids", row.hash_ids, fits, limit)
        rows.append(TraceRow(row.timestamp / 1e3, row.input_length, row.output_length, row.hash_ids))
        _check_order(name, number, "timestamp", row.timestamp, rows)
    return _finish(name, rows)


def parse_azure(name: str, lines: Iterable[str]) -> Trace:
    """Azure's CSV: a header, then one line for each request."""
    reader = csv.DictReader(lines, strict=True)
    rows: list[TraceRow] = []
    try:
        missing = {"TIMESTAMP", "ContextTokens", "GeneratedTokens"} - set(reader.fieldnames or ())
        if missing:
            raise InvalidArgument(f"{name}, line 1", ",".join(reader.fieldnames or ()), f"lacks {sorted(missing)}")
        for fields in reader:
            number = reader.line_num
            at_s = _timestamp_s(name, number, fields["TIMESTAMP"])
            num_prompt = _count(name, number, "ContextTokens", fields["ContextTokens"])
            rows.append(TraceRow(at_s, num_prompt, _count(name, number, "GeneratedTokens", fields["GeneratedTokens"])))
            _check_order(name, number, "TIMESTAMP", fields["TIMESTAMP"], rows)
    except csv.Error as error:
        raise InvalidArgument(f"{name}, line {reader.reader.line_num}", "", f"not CSV: {error}") from error
    return _finish(name, rows)


FORMATS: dict[str, Callable[[str, Iterable[str]], Trace]] = {"mooncake": parse_mooncake, "azure": parse_azure}


def spread_buckets(rows: Iterable[TraceRow]) -> tuple[TraceRow, ...]:
    """Rows that share a timestamp, spread evenly up to the next one.

    A trace whose clock ticks every few seconds would else arrive in bursts that nobody sent. The last bucket is taken
    to be as wide as the one before it.
    """
    buckets = [list(bucket) for _, bucket in groupby(rows, key=lambda row: row.at_s)]
    starts_s = [bucket[0].at_s for bucket in buckets]
    widths_s = [after - before for before, after in pairwise(starts_s)]
    widths_s.append(widths_s[-1] if widths_s else 0.0)
    return tuple(
        replace(row, at_s=start_s + width_s * position / len(bucket), is_spread=len(bucket) > 1 and width_s > 0)
        for bucket, start_s, width_s in zip(buckets, starts_s, widths_s, strict=True)
        for position, row in enumerate(bucket)
    )


def _finish(name: str, rows: list[TraceRow]) -> Trace:
    if not rows:
        raise InvalidArgument("trace", name, "has no rows")
    return Trace(name, 0, _from_zero(spread_buckets(rows)))


def _from_zero(rows: tuple[TraceRow, ...]) -> tuple[TraceRow, ...]:
    return tuple(replace(row, at_s=row.at_s - rows[0].at_s) for row in rows)


def _check(name: str, number: int, field: str, value: object, is_good: bool, limit: str) -> None:
    if not is_good:
        raise InvalidArgument(f"{name}, line {number}, {field}", value, limit)


def _check_length(name: str, number: int, field: str, count: int) -> None:
    _check(name, number, field, count, 1 <= count <= MAX_TOKENS, f"1 to {MAX_TOKENS} tokens")


def _check_order(name: str, number: int, field: str, value: object, rows: list[TraceRow]) -> None:
    is_later = len(rows) < 2 or rows[-1].at_s >= rows[-2].at_s
    _check(name, number, field, value, is_later, "not before the row above")


def _count(name: str, number: int, field: str, text: str | None) -> int:
    is_number = text is not None and text.isascii() and text.isdigit()
    _check(name, number, field, text, is_number, "a whole number of tokens")
    count = int(text or 0)
    _check_length(name, number, field, count)
    return count


def _timestamp_s(name: str, number: int, text: str | None) -> float:
    try:
        # Azure writes seven decimals; a datetime keeps six.
        when = datetime.fromisoformat(text or "")
    except ValueError as error:
        raise InvalidArgument(f"{name}, line {number}, TIMESTAMP", text, "a date and time") from error
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()
