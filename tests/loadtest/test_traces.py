"""Traces of both formats are read as they were written; a malformed row is named by file, line and field."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from common.errors import InvalidArgument
from loadtest.traces import Trace, TraceRow, parse_azure, parse_mooncake, read_trace, spread_buckets

_HEADER = "TIMESTAMP,ContextTokens,GeneratedTokens\r\n"


def _mooncake(timestamp: float, prompt: int, output: int, ids: list[int] | None = None) -> str:
    ids = list(range(-(-prompt // 512))) if ids is None else ids
    return json.dumps({"timestamp": timestamp, "input_length": prompt, "output_length": output, "hash_ids": ids}) + "\n"


def _azure(*rows: str) -> list[str]:
    return [_HEADER, *(f"{row}\r\n" for row in rows)]


def test_mooncake_rows() -> None:
    trace = parse_mooncake("t", [_mooncake(5000, 600, 7, [3, 9]), _mooncake(8000, 1, 1, [3])])
    assert trace.rows == (TraceRow(0.0, 600, 7, (3, 9)), TraceRow(3.0, 1, 1, (3,)))


def test_azure_rows_count_from_the_first() -> None:
    trace = parse_azure("t", _azure("2023-11-16 18:15:46.6805900,374,44", "2023-11-16 18:15:50.9951690,396,109"))
    assert [(row.num_prompt_tokens, row.num_output_tokens) for row in trace.rows] == [(374, 44), (396, 109)]
    assert trace.rows[0].at_s == 0.0
    assert trace.rows[1].at_s == pytest.approx(4.314579, abs=1e-6)


def test_rows_of_one_bucket_are_spread_up_to_the_next() -> None:
    rows = [TraceRow(at_s, 1, 1) for at_s in (0, 0, 0, 3, 5, 5)]
    spread = spread_buckets(rows)
    assert [row.at_s for row in spread] == [0.0, 1.0, 2.0, 3.0, 5.0, 6.0]
    assert [row.is_spread for row in spread] == [True, True, True, False, True, True]
    assert Trace("t", 0, spread).num_spread == 5
    assert Trace("t", 0, spread).select(2, 2).num_spread == 1


def test_rows_that_all_share_a_timestamp_stay_together() -> None:
    rows = spread_buckets([TraceRow(4.0, 1, 1)] * 3)
    assert [(row.at_s, row.is_spread) for row in rows] == [(4.0, False)] * 3


def test_a_selection_starts_at_zero_and_remembers_where_it_was() -> None:
    trace = Trace("t", 0, tuple(TraceRow(float(i), i + 1, 1) for i in range(10)))
    selected = trace.select(4, 3)
    assert selected.first_row == 4
    assert selected.rows == (TraceRow(0.0, 5, 1), TraceRow(1.0, 6, 1), TraceRow(2.0, 7, 1))
    assert selected.select(1, None).first_row == 5


@pytest.mark.parametrize(("first_row", "num_rows"), [(-1, None), (10, None), (0, 0), (8, 3)])
def test_a_selection_outside_the_trace_is_refused(first_row: int, num_rows: int | None) -> None:
    trace = Trace("t", 0, tuple(TraceRow(float(i), 1, 1) for i in range(10)))
    with pytest.raises(InvalidArgument):
        trace.select(first_row, num_rows)


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ("{", "not JSON"),
        ('{"timestamp": 1}', "input_length"),
        (_mooncake(2, 5, 1).replace("5", '"five"'), "input_length"),
        (_mooncake(2, 5, 0), "output_length"),
        (_mooncake(2, 0, 1, [0]), "input_length"),
        (_mooncake(2, 513, 1, [0]), "hash_ids"),
        (_mooncake(2, 5, 1, [-1]), "hash_ids"),
        (_mooncake(0, 5, 1), "timestamp"),
        ("\n", "not JSON"),
    ],
)
def test_malformed_mooncake_rows_are_named(line: str, named: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_mooncake("some.jsonl", [_mooncake(1, 5, 1), line])
    assert "some.jsonl, line 2" in str(refused.value)
    assert named in str(refused.value)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ("yesterday,1,1", "TIMESTAMP"),
        ("2023-11-16 18:15:47,x,1", "ContextTokens"),
        ("2023-11-16 18:15:47,1,0", "GeneratedTokens"),
        ("2023-11-16 18:15:47,1,-3", "GeneratedTokens"),
        ("2023-11-16 18:15:47,1", "GeneratedTokens"),
        ("2023-11-16 18:15:47,99999999999,1", "ContextTokens"),
        ("2023-11-16 18:15:45,1,1", "TIMESTAMP"),
        ('"2023', "not CSV"),
    ],
)
def test_malformed_azure_rows_are_named(row: str, named: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_azure("some.csv", _azure("2023-11-16 18:15:46,1,1", row))
    assert "some.csv, line 3" in str(refused.value)
    assert named in str(refused.value)


def test_a_header_without_a_column_is_refused() -> None:
    with pytest.raises(InvalidArgument, match="GeneratedTokens"):
        parse_azure("some.csv", ["TIMESTAMP,ContextTokens\n", "2023-11-16 18:15:46,1\n"])


def test_the_extension_says_the_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(_mooncake(1, 5, 1), encoding="utf-8")
    (tmp_path / "a.csv").write_text("".join(_azure("2023-11-16 18:15:46,8,2")), encoding="utf-8-sig")
    (tmp_path / "a.txt").write_text(_mooncake(1, 5, 1), encoding="utf-8")
    assert read_trace(tmp_path / "a.jsonl").rows == (TraceRow(0.0, 5, 1, (0,)),)
    assert read_trace(tmp_path / "a.csv").rows == (TraceRow(0.0, 8, 2),)
    assert read_trace(tmp_path / "a.txt", "mooncake").rows == (TraceRow(0.0, 5, 1, (0,)),)
    with pytest.raises(InvalidArgument, match="mooncake, azure"):
        read_trace(tmp_path / "a.txt")


def test_what_cannot_be_read_or_is_empty_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl")
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(InvalidArgument, match="cannot be read"):
        read_trace(tmp_path / "bytes.jsonl")
    (tmp_path / "empty.jsonl").write_bytes(b"")
    with pytest.raises(InvalidArgument, match="no rows"):
        read_trace(tmp_path / "empty.jsonl")
