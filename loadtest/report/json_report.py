"""A run, or a search for a rate, as a JSON file with all that went in and all that came out; `load` reads it back.

Keys of a run: schema_version, report (`run`), info, limits, summary, goodput, records, samples. Of a search:
schema_version, report (`search`), limits, itl_s, share, answer, ending, failure, probes; a probe has rate, is_met,
is_close_call and run, which is as a run's file. Below that, keys are the fields of `loadtest.record`, `.statistics` and
`.goodput`. Keys may be added at any time; `schema_version` rises when one goes or changes its meaning.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import msgspec

from common.errors import InvalidArgument
from loadtest.goodput import Goodput, Limits, goodput, goodputs
from loadtest.measured import measured_part
from loadtest.rate_search import Ending, Probe, RateSearch
from loadtest.record import PoolSample, RequestRecord, Run, RunInfo
from loadtest.statistics import Summary, summarize

SCHEMA_VERSION = 1

_FileT = TypeVar("_FileT")


class _Head(msgspec.Struct):
    """What says how to read the rest, and by what it was judged."""

    schema_version: int
    report: str
    limits: Limits


class _RunInput(msgspec.Struct, frozen=True, kw_only=True):
    """What is read back of a run's file."""

    schema_version: int
    report: str
    info: RunInfo
    limits: Limits
    records: tuple[RequestRecord, ...]
    samples: tuple[PoolSample, ...]


class _RunFile(_RunInput, frozen=True, kw_only=True):
    summary: Summary
    goodput: tuple[Goodput, ...]


class _ProbeEntry(msgspec.Struct, frozen=True, kw_only=True):
    rate: float
    is_met: bool
    is_close_call: bool
    run: _RunInput


class _SearchFile(msgspec.Struct, frozen=True, kw_only=True):
    schema_version: int
    report: str
    limits: Limits
    itl_s: float
    share: float
    answer: float | None
    ending: Ending
    failure: str = ""
    probes: tuple[_ProbeEntry, ...]


def write(run: Run, limits: Limits, path: Path) -> None:
    """Write a run's file; one that was there is replaced."""
    path.write_bytes(msgspec.json.encode(_run_file(run, limits)))


def write_search(search: RateSearch, limits: Limits, path: Path) -> None:
    """Write a search's file; one that was there is replaced."""
    probes = tuple(
        _ProbeEntry(
            rate=probe.rate,
            is_met=probe.is_met,
            is_close_call=probe.is_close_call,
            run=_run_file(probe.run, limits),
        )
        for probe in search.probes
    )
    file = _SearchFile(
        schema_version=SCHEMA_VERSION,
        report="search",
        limits=limits,
        itl_s=search.itl_s,
        share=search.share,
        answer=search.answer,
        ending=search.ending,
        failure=search.failure,
        probes=probes,
    )
    path.write_bytes(msgspec.json.encode(file))


def load(path: Path) -> Run:
    """The run of a file that `write` made. Raises `InvalidArgument` for any other file."""
    return _run_of(_decode(path, "run", _RunInput))


def load_search(path: Path) -> RateSearch:
    """The search of a file that `write_search` made. Raises `InvalidArgument` for any other file."""
    file = _decode(path, "search", _SearchFile)
    probes = tuple(_probe_of(entry, file) for entry in file.probes)
    return RateSearch(file.itl_s, file.share, probes, file.answer, file.ending, file.failure)


def load_limits(path: Path) -> Limits:
    """The limits that a run's or a search's file was judged by. Raises `InvalidArgument` for any other file."""
    return _head(_read(path), path).limits


def _run_file(run: Run, limits: Limits) -> _RunFile:
    measured = measured_part(run)
    return _RunFile(
        schema_version=SCHEMA_VERSION,
        report="run",
        info=run.info,
        limits=limits,
        summary=summarize(measured),
        goodput=goodputs(measured, limits),
        records=run.records,
        samples=run.samples,
    )


def _run_of(file: _RunInput) -> Run:
    return Run(info=file.info, records=file.records, samples=file.samples)


def _probe_of(entry: _ProbeEntry, file: _SearchFile) -> Probe:
    run = _run_of(entry.run)
    result = goodput(measured_part(run), file.limits.ttft_s, file.itl_s)
    return Probe(entry.rate, run, result, is_met=entry.is_met, is_close_call=entry.is_close_call)


def _decode(path: Path, report: str, kind: type[_FileT]) -> _FileT:
    data = _read(path)
    head = _head(data, path)
    if head.report != report:
        raise InvalidArgument("report", head.report, f"{path} is no report of a {report}")
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.DecodeError as error:
        raise InvalidArgument("path", str(path), f"a report that was changed: {error}") from error


def _head(data: bytes, path: Path) -> _Head:
    try:
        head = msgspec.json.decode(data, type=_Head)
    except msgspec.DecodeError as error:
        raise InvalidArgument("path", str(path), f"not a report of a load test: {error}") from error
    if head.schema_version != SCHEMA_VERSION:
        raise InvalidArgument("schema_version", head.schema_version, f"{path}: only {SCHEMA_VERSION} can be read")
    return head


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArgument("path", str(path), f"cannot be read: {error.strerror}") from error
