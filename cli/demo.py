"""Start everything, generate from a prompt through the router, print where the time went, stop everything."""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from baton.v1 import inference_pb2, sampling_pb2

from cli.client import connect
from cli.deployment import Deployment, DeploymentSpec
from cli.generate import stream_to_stdout
from cli.up import DEFAULT_MODEL

PROMPT = '''"""Utilities for reading configuration files."""

import os
import re


class ConfigReader:
    """Reads a configuration file.'''


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `baton demo`."""
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL, help="Hugging Face directory")
    parser.add_argument("--decode-tp", type=int, default=2, metavar="N", help="ranks of the decode worker (2)")
    parser.add_argument("--max-tokens", type=int, default=160, help="tokens to generate (160)")
    parser.add_argument("--prompt", default=PROMPT, help="what to continue")


async def run(args: argparse.Namespace) -> int:
    """Run `baton demo`. The status is 0 only if text came back over the whole path."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="baton-demo-") as log_dir:
        spec = DeploymentSpec(model=args.model, decode_tp=args.decode_tp, log_dir=Path(log_dir), restart=False)
        print(f"starting router, 1 prefill worker and 1 decode worker with {args.decode_tp} ranks ...")
        try:
            async with Deployment(spec, on_event=print) as deployment:
                await deployment.ready(timeout_s=60.0)
                print(f"ready after {time.monotonic() - started:.1f} s\n\n{args.prompt}", end="", flush=True)
                request = inference_pb2.GenerateRequest(
                    text=args.prompt,
                    sampling=sampling_pb2.SamplingParams(max_tokens=args.max_tokens, temperature=0.0),
                )
                async with connect(deployment.router_address) as client:
                    text = await stream_to_stdout(client, request, timeout_s=60.0, stats=True)
        except BaseException:
            _print_logs(Path(log_dir))
            raise
    print(f"stopped after {time.monotonic() - started:.1f} s")
    return 0 if text else 1


def _print_logs(log_dir: Path) -> None:
    for path in sorted(log_dir.glob("*.log")):
        print(f"--- {path.name}\n{path.read_text(errors='replace')[-4000:]}")
