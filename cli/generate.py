"""Send one prompt to a running router and stream the text to standard output."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict

from baton.v1 import inference_pb2
from rich.console import Console

from cli.client import Client, add_connection_arguments, add_sampling_arguments, connect, sampling_from
from cli.lifetime_table import print_lifetime


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `baton generate`."""
    parser.add_argument("prompt", help="the prompt, or - for standard input")
    parser.add_argument("--n", type=int, help="number of outputs (default 1)")
    parser.add_argument("--stop", action="append", default=[], help="end before this string (may be repeated)")
    parser.add_argument("--model", help="refuse to be answered by another model")
    parser.add_argument("--tenant", help="share cached blocks with this tenant only")
    parser.add_argument("--stats", action="store_true", help="print the lifetime table at the end")
    add_sampling_arguments(parser)
    add_connection_arguments(parser)


async def run(args: argparse.Namespace) -> int:
    """Run `baton generate`."""
    request = inference_pb2.GenerateRequest(
        text=sys.stdin.read() if args.prompt == "-" else args.prompt,
        sampling=sampling_from(args),
        stop=args.stop,
        n=args.n,
        model=args.model,
        tenant=args.tenant,
    )
    async with connect(args.address) as client:
        if (args.n or 1) == 1:
            await stream_to_stdout(client, request, args.timeout, args.stats)
        else:
            await _print_choices(client, request, args.timeout)
    return 0


async def stream_to_stdout(
    client: Client, request: inference_pb2.GenerateRequest, timeout_s: float | None, stats: bool
) -> str:
    """Print the only choice's text as it comes, and the lifetime if asked for. Returns the text."""
    text: list[str] = []
    num_tokens = 0
    async for response in client.generate(request, timeout_s):
        print(response.text_delta, end="", flush=True)
        text.append(response.text_delta)
        num_tokens += len(response.token_ids)
        if response.HasField("usage"):
            print(flush=True)
            if stats:
                print_lifetime(Console(), response.lifetime, response.usage, num_tokens)
    return "".join(text)


async def _print_choices(client: Client, request: inference_pb2.GenerateRequest, timeout_s: float | None) -> None:
    texts: dict[int, list[str]] = defaultdict(list)
    async for response in client.generate(request, timeout_s):
        texts[response.choice].append(response.text_delta)
    for choice in sorted(texts):
        print(f"--- {choice} ---\n{''.join(texts[choice])}")
