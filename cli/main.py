"""Entry point of the `baton` command: parses arguments and hands over to one module for each subcommand."""

import argparse
import asyncio
import sys
from collections.abc import Sequence

from cli import bench, chat, demo, generate, top, up
from common.errors import BatonError

COMMANDS = {"up": up, "generate": generate, "chat": chat, "demo": demo, "bench": bench, "top": top}


def build_parser() -> argparse.ArgumentParser:
    """The command line, one subparser for each command."""
    parser = argparse.ArgumentParser(prog="baton", description=__doc__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        summary = (module.__doc__ or "").strip().splitlines()[0]
        module.add_arguments(subparsers.add_parser(name, help=summary, description=summary))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted."""
    args = build_parser().parse_args(argv)
    try:
        status: int = asyncio.run(COMMANDS[args.command].run(args))
        return status
    except KeyboardInterrupt:
        return 130
    except BatonError as error:
        print(f"baton {args.command}: {type(error).__name__}: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
