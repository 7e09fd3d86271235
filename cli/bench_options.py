"""The flags of `baton bench`, and the load test that they describe. Reads trace files; reaches no server."""

from __future__ import annotations

import argparse
import secrets
from dataclasses import replace
from pathlib import Path

from cli.client import DEFAULT_ADDRESS
from cli.flag_types import host_port, number, seconds, whole
from common.errors import InvalidArgument
from common.sampling.limits import MAX_SEED
from loadtest.arrivals import Arrivals
from loadtest.goodput import Limits
from loadtest.lengths import SYNTAX, parse_lengths
from loadtest.pacing import ClosedLoop, TraceTimes
from loadtest.sizes import RandomSizes, TraceSizes
from loadtest.targets.base import TargetSpec
from loadtest.traces import FORMATS, Trace, read_trace
from loadtest.workload import Pacing, Sizes, Workload

_DEFAULT_INPUT_TOKENS = "128"
_DEFAULT_OUTPUT_TOKENS = "64"
_DEFAULT_REQUESTS = 100
_MAX_REQUESTS = 10_000_000  # all are planned before the first is sent
_MAX_IN_FLIGHT = 1 << 16
_rate, _scale = number(0, 1e6, above=True), number(0, 1e6, above=True)
_DEFAULT_CONCURRENCY = 8  # a closed loop overloads no server


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `baton bench`."""
    _add_target(parser)
    _add_arrivals(parser)
    _add_lengths(parser)
    _add_run(parser)
    _add_judgement(parser)


def _add_target(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("servers; of several, each gets the same load, one after the other")
    add = group.add_argument
    add(
        "--address",
        type=host_port,
        action="append",
        default=[],
        metavar="H:P",
        help=f"router ({DEFAULT_ADDRESS}; repeatable)",
    )
    add("--openai", action="append", default=[], metavar="URL", help="OpenAI-compatible server (repeatable)")
    add("--model", default="", help="name of the model to ask for (default: the one served)")
    add(
        "--vocab-size",
        type=whole(1, 1 << 24),
        help="vocabulary of the model; --openai needs it, a router tells its own",
    )
    add(
        "--connections", type=whole(1, 1024), default=1, metavar="N", help="connections of each process to a router (1)"
    )
    add("--timeout", type=seconds, default=600.0, metavar="S", help="deadline of a request in seconds (600)")
    add(
        "--worker",
        type=host_port,
        action="append",
        default=[],
        metavar="HOST:PORT",
        help="sample this worker's queues (repeatable)",
    )


def _add_arrivals(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("when requests arrive").add_mutually_exclusive_group()
    add = group.add_argument
    add("--poisson", type=_rate, metavar="RATE", help="Poisson arrivals, requests/s")
    add("--gamma", type=_rate, metavar="RATE", help="gamma arrivals, as bursty as --cv says")
    add("--constant", type=_rate, metavar="RATE", help="evenly spaced arrivals")
    loop = f"closed loop: N in flight, the next is sent when one ends ({_DEFAULT_CONCURRENCY}, where no flag says when)"
    add("--concurrency", type=whole(1, _MAX_IN_FLIGHT), metavar="N", help=loop)
    add("--trace", type=Path, metavar="FILE", help="a trace's own times and lengths")
    add(
        "--find-rate",
        type=number(0, 1, above=True),
        metavar="SHARE",
        help="search the highest rate at which SHARE meet the limits",
    )
    add = parser.add_argument
    add(
        "--cv",
        type=number(0, 100),
        help="coefficient of variation of the gaps of --gamma or --find-rate (1 is Poisson)",
    )
    add("--rate-scale", type=_scale, default=1.0, metavar="X", help="send X times the rate of --trace (1)")


def _add_lengths(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how long requests are").add_argument
    add("--input-tokens", metavar="L", help=f"prompt lengths: {SYNTAX} ({_DEFAULT_INPUT_TOKENS})")
    add("--output-tokens", metavar="L", help=f"output lengths, written the same way ({_DEFAULT_OUTPUT_TOKENS})")
    add("--lengths-from", type=Path, metavar="FILE", help="lengths, and shared prefixes, of a trace; not its times")
    add("--trace-format", choices=sorted(FORMATS), help="default: azure for .csv, mooncake for .jsonl")
    add("--first-row", type=whole(0), default=0, metavar="N", help="first row of the trace, counted from 0 (0)")
    add("--rows", type=whole(1), metavar="N", help="rows of the trace (all)")
    add("--length-scale", type=_scale, default=1.0, metavar="X", help="multiply the trace's lengths by X (1)")
    add("--clip", action="store_true", help="cut requests longer than the model's context instead of refusing them")


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the run").add_argument
    add(
        "--requests",
        type=whole(1, _MAX_REQUESTS),
        metavar="N",
        help=f"most requests ({_DEFAULT_REQUESTS}; with --trace all rows)",
    )
    add("--duration", type=seconds, metavar="S", help="send nothing after S seconds")
    add(
        "--warmup",
        type=whole(0, _MAX_REQUESTS),
        default=8,
        metavar="N",
        help="requests before the run that are not measured (8)",
    )
    add("--seed", type=whole(0, MAX_SEED), help="of arrivals, lengths and prompts (default: drawn; the report has it)")
    add("--processes", type=whole(1, 256), default=1, metavar="N", help="client processes (1)")
    add(
        "--max-in-flight",
        type=whole(1, _MAX_IN_FLIGHT),
        default=1024,
        metavar="N",
        help="most requests in flight of a process (1024)",
    )


def _add_judgement(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("judgement and reports").add_argument
    add("--ttft-limit", type=seconds, metavar="S", help="longest good time to first token, seconds")
    add("--itl-limit", type=seconds, action="append", default=[], metavar="S", help="longest good gap (repeatable)")
    add("--low-rate", type=_rate, default=1.0, metavar="RATE", help="where --find-rate begins (1)")
    add("--high-rate", type=_rate, default=1000.0, metavar="RATE", help="where --find-rate ends at the latest (1000)")
    add(
        "--resolution",
        type=number(0, 1, above=True),
        default=0.05,
        metavar="X",
        help="relative error of --find-rate (0.05)",
    )
    add("--max-runs", type=whole(1, 1000), default=12, metavar="N", help="most runs of --find-rate (12)")
    add(
        "--json", type=Path, metavar="FILE", help="all that was measured; of several servers FILE.1.json, FILE.2.json …"
    )
    add("--html", type=Path, metavar="FILE", help="write a page with curves")


def targets_from(args: argparse.Namespace) -> list[TargetSpec]:
    """The servers that the flags name, routers first."""
    if args.vocab_size is not None and not args.openai:
        raise InvalidArgument("--vocab-size", args.vocab_size, "goes with --openai; a router tells its own")
    if args.vocab_size is None and args.openai:
        raise InvalidArgument("--vocab-size", None, "--openai needs it: prompts are token ids")
    for url in args.openai:
        if not url.startswith(("http://", "https://")):
            raise InvalidArgument("--openai", url, "a URL, as in http://127.0.0.1:8000")
    routers = args.address or ([] if args.openai else [DEFAULT_ADDRESS])
    if args.worker and (args.openai or len(routers) > 1):
        raise InvalidArgument("--worker", args.worker[0], "goes with one router, and no other server")
    if args.find_rate is not None and len(routers) + len(args.openai) > 1:
        raise InvalidArgument("--find-rate", args.find_rate, "searches at one server, not at several")
    return [
        *(TargetSpec("baton", address, args.model, num_connections=args.connections) for address in routers),
        *(TargetSpec("openai", url, args.model, args.vocab_size) for url in args.openai),
    ]


def limits_from(args: argparse.Namespace) -> Limits:
    """What requests are judged by."""
    if args.find_rate is not None and not args.itl_limit:
        raise InvalidArgument("--itl-limit", None, "--find-rate needs one; it searches by the first")
    return Limits(ttft_s=args.ttft_limit, itl_s=tuple(args.itl_limit))


def workload_from(args: argparse.Namespace) -> Workload:
    """The requests that the flags describe."""
    trace = _trace_from(args)
    num_requests = args.requests
    if num_requests is None and args.duration is None and args.trace is None:
        num_requests = _DEFAULT_REQUESTS if trace is None else min(_DEFAULT_REQUESTS, len(trace.rows))
    if trace is not None and num_requests is not None and 1 <= num_requests < len(trace.rows):
        trace = trace.select(0, num_requests)  # so that the report names the rows that were used
    return Workload(_pacing_from(args, trace), _sizes_from(args, trace), _seed_from(args), num_requests, args.duration)


def clipped(workload: Workload, args: argparse.Namespace, context_length: int | None) -> Workload:
    """The workload cut to the model's context, if `--clip` says so."""
    if not args.clip:
        return workload
    if context_length is None:
        raise InvalidArgument("--clip", True, "the server does not say how long the model's context is")
    return replace(workload, clip_tokens=context_length)


def _seed_from(args: argparse.Namespace) -> int:
    # Drawn anew if not given: a server that has seen these prompts in an earlier run may have cached them.
    return secrets.randbelow(2**31) if args.seed is None else int(args.seed)


def _trace_from(args: argparse.Namespace) -> Trace | None:
    path = args.trace or args.lengths_from
    if args.trace is not None and args.lengths_from is not None:
        raise InvalidArgument("--lengths-from", str(args.lengths_from), "--trace brings its own lengths")
    if path is not None:
        _refuse(
            args, "goes without a trace; --length-scale scales the trace's lengths", "input_tokens", "output_tokens"
        )
        return read_trace(path, args.trace_format).select(args.first_row, args.rows)
    _refuse(args, "goes with --trace or --lengths-from", "trace_format", "first_row", "rows", "length_scale")
    return None


def _pacing_from(args: argparse.Namespace, trace: Trace | None) -> Pacing:
    if args.trace is None:
        _refuse(args, "goes with --trace", "rate_scale")
    if args.gamma is None and args.find_rate is None:
        _refuse(args, "goes with --gamma or --find-rate", "cv")
    if args.poisson is not None:
        return Arrivals(args.poisson)
    if args.gamma is not None:
        if args.cv is None:
            raise InvalidArgument("--cv", None, "--gamma needs it")
        return Arrivals(args.gamma, args.cv)
    if args.constant is not None:
        return Arrivals(args.constant, cv=0.0)
    if args.concurrency is not None:
        return ClosedLoop(args.concurrency)
    if args.find_rate is not None:
        return Arrivals(args.low_rate, 1.0 if args.cv is None else args.cv)
    if args.trace is not None and trace is not None:
        return TraceTimes(trace, args.rate_scale)
    return ClosedLoop(_DEFAULT_CONCURRENCY)


def _sizes_from(args: argparse.Namespace, trace: Trace | None) -> Sizes:
    if trace is not None:
        return TraceSizes(trace, args.length_scale)
    return RandomSizes(
        parse_lengths("--input-tokens", args.input_tokens or _DEFAULT_INPUT_TOKENS),
        parse_lengths("--output-tokens", args.output_tokens or _DEFAULT_OUTPUT_TOKENS),
    )


_UNSET = {"first_row": 0, "length_scale": 1.0, "rate_scale": 1.0}


def _refuse(args: argparse.Namespace, why: str, *names: str) -> None:
    """A flag that would be ignored is an error."""
    for name in names:
        if (value := getattr(args, name)) != _UNSET.get(name):
            raise InvalidArgument("--" + name.replace("_", "-"), value, why)
