"""Entry point of the `baton` command: parses arguments and hands over to one module for each subcommand.

The one place where what went wrong becomes a line on standard error and an exit status.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import NoReturn

import grpc

from cli import bench, chat, demo, generate, top, up
from common.errors import BatonError, InvalidArgument, ModelError
from common.rpc.status import error_from_rpc, find_baton_error

COMMANDS = {"up": up, "generate": generate, "chat": chat, "demo": demo, "bench": bench, "top": top}
# These start no service, whose log would lack what gRPC says there.
_CLIENTS = ("generate", "chat", "bench", "top")

FAILED, WRONG_ARGUMENTS, INTERRUPTED, NO_READER = 1, 2, 130, 141
_WRONG = (InvalidArgument, ModelError)


class _Parser(argparse.ArgumentParser):
    """Complains in one line: the usage of a command with many flags would hide it."""

    def error(self, message: str) -> NoReturn:
        self.exit(WRONG_ARGUMENTS, f"{self.prog}: {' '.join(message.split())}; see {self.prog} --help\n")


def build_parser() -> argparse.ArgumentParser:
    """The command line, one subparser for each command."""
    parser = _Parser(prog="baton", description="Serve large language models with prefill and decode apart.")
    parser.add_argument("--version", action="version", version=f"baton {_version()}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0]
        module.add_arguments(subparsers.add_parser(name, help=summary, description=summary))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted, 141 if nobody
    reads its output any more, as of a program that SIGPIPE ends."""
    _spell_out_what_the_terminal_lacks()
    try:
        try:
            return _run(sys.argv[1:] if argv is None else argv)
        finally:
            if sys.stdout is not None:  # it is closed
                sys.stdout.flush()  # here, where a failure can be told
    except BrokenPipeError:
        _discard_output()
        return NO_READER
    except OSError as error:
        _discard_output()
        return _complain("baton", error)


def _run(argv: Sequence[str]) -> int:
    try:
        _require_utf8(argv)
        parser = build_parser()
        args = parser.parse_args(argv)
    except InvalidArgument as error:
        return _complain("baton", error)
    except SystemExit as end:  # the parser has printed what was asked for, or what is wrong
        return end.code if isinstance(end.code, int) else 0
    if args.command is None:
        parser.print_help()
        return 0
    if args.command in _CLIENTS:
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # it writes about connections between the lines of the output
    try:
        status: int = asyncio.run(COMMANDS[args.command].run(args))
        return status
    except KeyboardInterrupt:
        return INTERRUPTED
    except (BatonError, UnicodeError, grpc.aio.AioRpcError, ExceptionGroup) as error:
        known = _known(error)
        if known is None:
            raise
        return _complain(f"baton {args.command}", known)


def _known(error: Exception) -> Exception | None:
    """What a person is told about; None for a group without anything of ours, which is a bug."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error_from_rpc(error)
    return find_baton_error(error) if isinstance(error, ExceptionGroup) else error


def _complain(program: str, error: Exception) -> int:
    print(f"{program}: {type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
    return WRONG_ARGUMENTS if isinstance(error, _WRONG) else FAILED


def _require_utf8(argv: Sequence[str]) -> None:
    """Arguments become text of requests and reports. Python keeps bytes that are no text as lone surrogates."""
    for position, argument in enumerate(argv, start=1):
        try:
            argument.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgument(f"argument {position}", argument, "not UTF-8") from error


def _spell_out_what_the_terminal_lacks() -> None:
    """Where standard output is not UTF-8, a character that it has not is shown as its number."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_output() -> None:
    """Python would try to write what is left once more at its end, and complain."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _version() -> str:
    try:
        return metadata.version("baton")
    except metadata.PackageNotFoundError:  # it runs from a directory that was not installed
        return "(version unknown)"


if __name__ == "__main__":
    sys.exit(main())
