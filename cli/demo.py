"""Start everything, generate from a prompt through the router, print where the time went, stop everything."""

from __future__ import annotations

import argparse
import bisect
import tempfile
import time
from pathlib import Path

from baton.v1 import inference_pb2, sampling_pb2

from cli.answer import Answer, stream_to_stdout
from cli.client import connect
from cli.console import open_console
from cli.deployment import Deployment, DeploymentSpec
from cli.flag_types import whole
from cli.lifetime_table import print_lifetime
from cli.up import DEFAULT_MODEL
from common.sampling.limits import MAX_TOKENS

PROMPT_END = "def insort_left(a, x, lo=0, hi=None, *, key=None):"
NUM_SHOWN_LINES = 6


def default_prompt() -> str:
    """The source of the standard library's `bisect`, cut off after the head of `insort_left`: some 500 tokens."""
    source = Path(bisect.__file__).read_text(encoding="utf-8")
    return source[: source.index(PROMPT_END) + len(PROMPT_END)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `baton demo`."""
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="Hugging Face directory")
    ranks = "ranks of the decode worker (2)"
    parser.add_argument("--decode-tp", type=whole(1, 64), default=2, metavar="N", help=ranks)
    tokens = "most tokens to generate (120)"
    parser.add_argument("--max-tokens", type=whole(1, MAX_TOKENS), default=120, metavar="N", help=tokens)
    parser.add_argument("--prompt", default=default_prompt(), help="what to continue (the start of bisect.py)")


async def run(args: argparse.Namespace) -> int:
    """Run `baton demo`. The status is 0 only if text came back over the whole path."""
    started = time.monotonic()
    answer = Answer()
    with tempfile.TemporaryDirectory(prefix="baton-demo-") as log_dir:
        spec = DeploymentSpec(model=args.model, decode_tp=args.decode_tp, log_dir=Path(log_dir), restart=False)
        try:
            async with Deployment(spec, on_event=print) as deployment:
                print(f"starting router, 1 prefill worker and 1 decode worker with {args.decode_tp} ranks ...")
                await deployment.ready(timeout_s=60.0)
                print(f"ready after {time.monotonic() - started:.1f} s; the end of the prompt, and what follows:\n")
                print("\n".join(args.prompt.splitlines()[-NUM_SHOWN_LINES:]), end="", flush=True)
                request = inference_pb2.GenerateRequest(
                    text=args.prompt,
                    sampling=sampling_pb2.SamplingParams(max_tokens=args.max_tokens, temperature=0.0),
                )
                async with connect(deployment.router_address) as client:
                    await stream_to_stdout(client, request, 60.0, answer)
                print_lifetime(open_console(), answer.only.lifetime, answer.usage, answer.only.num_tokens)
        except Exception:
            _print_logs(Path(log_dir))
            raise
    print(f"stopped after {time.monotonic() - started:.1f} s")
    return 0 if answer.only.text else 1


def _print_logs(log_dir: Path) -> None:
    for path in sorted(log_dir.glob("*.log")):
        if text := path.read_text(errors="replace"):
            print(f"--- {path.name}\n{text[-4000:]}")
