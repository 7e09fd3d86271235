"""Tokens per second of the whole path on a CPU, against transformers on the same weights in the same run.

    python -m benchmarks.cpu_path [--check]

Several times in turn: transformers' `generate` in one process (one torch thread, as every rank has), one stream through
router, prefill and decode (TP 1), and 32 streams at once. Every output of every round must be what transformers says.
With --check the exit status is 1 if a limit is missed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from baton.v1 import inference_pb2, sampling_pb2
from transformers import AutoModelForCausalLM

from benchmarks.limits import Limit, exit_status
from cli.client import Client, connect
from cli.deployment import Deployment, DeploymentSpec
from cli.up import DEFAULT_MODEL

NUM_PROMPT_TOKENS = 64
NUM_STREAMS = 32
VOCAB_SIZE = 4096
TIE = 1e-3  # logits that differ by less may come in either order: sums over 32 rows are rounded otherwise than over one
LIMITS = (Limit("one stream / transformers", ">=", 0.6), Limit("32 streams / one stream", ">=", 4.0))


def _prompt(seed: int) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(VOCAB_SIZE) for _ in range(NUM_PROMPT_TOKENS)]


class _Transformers:
    """Greedy generation in this process, and what it says about the outputs of others."""

    def __init__(self, model_dir: Path) -> None:
        torch.set_num_threads(1)
        self._model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    def generate(self, prompt: list[int], num_tokens: int) -> tuple[list[int], float]:
        """The tokens, and tokens per second."""
        inputs = torch.tensor([prompt])
        started = time.perf_counter()
        with torch.inference_mode():
            out = self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=num_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        elapsed = time.perf_counter() - started
        return [int(token) for token in out[0, len(prompt) :]], num_tokens / elapsed

    def check(self, prompts: list[list[int]], outputs: list[list[int]], num_tokens: int) -> None:
        """Require that every token of every output is the greedy one after what comes before it. Prompts are of one
        length. Exits with what differs."""
        if any(len(output) != num_tokens for output in outputs):
            raise SystemExit(f"outputs of {sorted({len(output) for output in outputs})} tokens, not {num_tokens}")
        whole = torch.tensor([prompt + output for prompt, output in zip(prompts, outputs, strict=True)])
        with torch.inference_mode():
            logits = self._model(whole).logits[:, NUM_PROMPT_TOKENS - 1 : -1]  # [outputs, num_tokens, vocab]
        chosen = logits.gather(-1, whole[:, NUM_PROMPT_TOKENS:, None])[..., 0]
        behind = logits.amax(-1) - chosen
        if bool((behind > TIE).any()):
            stream, position = (int(index) for index in (behind > TIE).nonzero()[0])
            raise SystemExit(f"stream {stream} of {len(outputs)}: token {position} is not the one of transformers")


async def _stream(client: Client, prompt: list[int], num_tokens: int) -> list[int]:
    request = inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=prompt),
        sampling=sampling_pb2.SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True),
    )
    return [token async for response in client.generate(request, 300.0) for token in response.token_ids]


async def _streams(client: Client, prompts: list[list[int]], num_tokens: int) -> tuple[list[list[int]], float]:
    started = time.perf_counter()
    outputs = await asyncio.gather(*(_stream(client, prompt, num_tokens) for prompt in prompts))
    elapsed = time.perf_counter() - started
    return outputs, len(prompts) * num_tokens / elapsed


async def measure(num_tokens: int, num_rounds: int) -> dict[str, float]:
    """Medians over the rounds: tokens per second of the three, and their ratios."""
    reference = _Transformers(DEFAULT_MODEL)
    with tempfile.TemporaryDirectory() as logs:
        async with Deployment(DeploymentSpec(model=DEFAULT_MODEL, log_dir=Path(logs))) as deployment:
            await deployment.ready(120.0)
            async with connect(deployment.router_address) as client:
                rounds = [await _round(reference, client, number, num_tokens) for number in range(num_rounds + 1)]
    del rounds[0]  # it warms up
    medians = {name: statistics.median(rates[name] for rates in rounds) for name in rounds[0]}
    medians["one stream / transformers"] = medians["one stream"] / medians["transformers"]
    medians["32 streams / one stream"] = medians["32 streams"] / medians["one stream"]
    return medians


async def _round(reference: _Transformers, client: Client, number: int, num_tokens: int) -> dict[str, float]:
    """Tokens per second of each, once. Exits if an output is wrong."""
    prompt = _prompt(1000 + number)
    expected, reference_rate = reference.generate(prompt, num_tokens)
    (output,), one_rate = await _streams(client, [prompt], num_tokens)
    if output != expected:
        raise SystemExit(f"round {number}, one stream: the outputs differ; nothing was measured")
    prompts = [_prompt(10_000 + 100 * number + index) for index in range(NUM_STREAMS)]
    outputs, many_rate = await _streams(client, prompts, num_tokens)
    reference.check(prompts, outputs, num_tokens)
    return {"transformers": reference_rate, "one stream": one_rate, "32 streams": many_rate}


def main() -> int:
    """Measure and print. Returns 1 if a limit was to be checked and is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128, help="tokens per request (128)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds after the first (5)")
    parser.add_argument("--check", action="store_true", help="exit with 1 if a limit is missed")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    args = parser.parse_args()
    figures = asyncio.run(measure(args.tokens, args.rounds))
    print(f"{date.today()}, {platform.processor() or platform.machine()}, torch {torch.__version__}")
    for name, value in figures.items():
        print(f"{name:28} {value:10.2f}")
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")
    return exit_status(figures, LIMITS) if args.check else 0


if __name__ == "__main__":
    sys.exit(main())
