"""Send one prompt to a running router and stream the text to standard output."""

from __future__ import annotations

import argparse
import sys

from baton.v1 import inference_pb2

from cli.answer import Answer, Choice, gather, stream_to_stdout
from cli.client import MAX_MESSAGE_BYTES, add_connection_arguments, add_sampling_arguments, connect, sampling_from
from cli.console import open_console
from cli.flag_types import whole
from cli.lifetime_table import print_lifetime
from cli.logprobs_table import print_logprobs
from common.errors import InvalidArgument
from common.sampling.limits import MAX_CHOICES, MAX_LOGPROBS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `baton generate`."""
    add = parser.add_argument
    add("prompt", help="the prompt, or - for standard input; after -- if it begins with a dash")
    add("--n", type=whole(1, MAX_CHOICES), metavar="N", help=f"number of outputs, 1 to {MAX_CHOICES} (1)")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this string (may be repeated)")
    add("--model", metavar="NAME", help="refuse to be answered by another model")
    add("--tenant", metavar="NAME", help="share cached blocks with this tenant only")
    add("--echo", action="store_true", help="print the prompt before the output")
    add("--stats", action="store_true", help="print the lifetime table of each output at the end")
    logprobs = f"print each token's log-probability and so many alternatives at the end, 0 to {MAX_LOGPROBS}"
    add("--logprobs", type=whole(0, MAX_LOGPROBS), metavar="N", help=logprobs)
    add_sampling_arguments(parser)
    add_connection_arguments(parser)


async def run(args: argparse.Namespace) -> int:
    """Run `baton generate`."""
    prompt = _standard_input() if args.prompt == "-" else args.prompt
    request = inference_pb2.GenerateRequest(
        text=prompt, sampling=sampling_from(args), stop=args.stop, n=args.n, model=args.model, tenant=args.tenant
    )
    answer, echoed = Answer(), prompt if args.echo else ""
    async with connect(args.address) as client:
        if (args.n or 1) == 1:
            print(echoed, end="", flush=True)
            await stream_to_stdout(client, request, args.timeout, answer)
        else:
            await gather(client, request, args.timeout, answer)
            for index, choice in sorted(answer.choices.items()):
                print(f"--- {index} ---\n{echoed}{choice.text}")
    for index, choice in sorted(answer.choices.items()):
        _print_tables(args, f" of output {index}" if len(answer.choices) > 1 else "", choice, answer.usage)
    return 0


def _print_tables(args: argparse.Namespace, of_which: str, choice: Choice, usage: inference_pb2.Usage) -> None:
    console = open_console()
    if args.logprobs is not None:
        print_logprobs(console, f"log-probabilities{of_which}", choice.logprobs)
    if args.stats:
        print_lifetime(console, choice.lifetime, usage, choice.num_tokens, of_which)


def _standard_input() -> str:
    """All of it. Raises `InvalidArgument` if it is no text, or more than a message holds."""
    if sys.stdin is None:
        raise InvalidArgument("prompt", "-", "standard input is closed")
    content = sys.stdin.buffer.read(MAX_MESSAGE_BYTES + 1)
    if len(content) > MAX_MESSAGE_BYTES:
        raise InvalidArgument("standard input", "longer", f"at most {MAX_MESSAGE_BYTES} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        shown = content[error.start : error.start + 8]
        raise InvalidArgument("standard input", shown, f"not UTF-8 from byte {error.start} on") from error
