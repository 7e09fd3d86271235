"""How often seeded requests choose other tokens within a batch than alone, on the same engine.

    python -m benchmarks.seeded [--requests 256] [--batch 64] [--tokens 32] [--layers 4] [--out FILE.json]

Half of the requests draw with temperature 1, half with top-p 0.95 too. *Alone*: the prompt in a step of its own, then
steps with one row. *Within a batch*: prompts in steps of up to 2,048 tokens, as a prefill worker packs them, then steps
with all rows. Random numbers are counters' and the same in both, which is checked first; tokens differ where sums that
were added up in another order move a logit across a draw. The same batch again is the control.

The shipped checkpoint in float32 reads Python source; an 8B shape with a few layers follows, in bfloat16 with random
weights, whose next token is far less certain than a trained model's. Without a GPU the second has the shipped shape,
and both run as on a CPU worker.
"""

from __future__ import annotations

import argparse
import inspect
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import tokenizers
import torch

from benchmarks.goodput import SHIPPED
from benchmarks.random_model import BLOCK_SIZE, Front, random_decoder, random_storage, read_shape
from benchmarks.rehearsal import device_name
from benchmarks.seeded_agreement import HEADER, Agreement, compare
from benchmarks.seeded_draws import check_draws
from common.models.config import read_model_config
from common.models.decoder import Decoder
from common.parallel.group import TensorParallelGroup
from common.sampling.params import SamplingParams
from common.sampling.sampler import BatchSampler
from common.worker.model_runner import ModelRunner, Runner
from common.worker.step_plan import Segment, StepPlan

PROMPT_LENGTHS: Final = (16, 129)  # tokens, from and below
MAX_STEP_TOKENS: Final = 2048


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and how its output is drawn."""

    prompt: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True)
class Model:
    """A decoder with the runner that a worker on its device has."""

    name: str
    runner: Runner
    num_blocks: int
    vocab_size: int
    device: torch.device


def make_model(name: str, decoder: Decoder, batch: int, num_tokens: int) -> Model:
    """On a GPU steps with one row and with `batch` rows are captured."""
    num_blocks = batch * -(-(PROMPT_LENGTHS[1] + num_tokens) // BLOCK_SIZE)
    storage = random_storage(decoder, num_blocks)
    runner: Runner
    if decoder.device.type == "cuda":
        from common.worker.device_runner import DeviceRunner

        runner = DeviceRunner(decoder, storage, batch, graph_sizes=tuple(sorted({1, batch})))
    else:
        vocab_size = decoder.config.vocab_size
        runner = ModelRunner(decoder, storage, BatchSampler(vocab_size, batch, decoder.device), batch)
    return Model(name, runner, num_blocks, decoder.config.vocab_size, decoder.device)


def make_requests(text: Sequence[int], num_requests: int, num_tokens: int) -> list[Request]:
    """Pieces of `text` with seeds of their own; every other one with top-p."""
    rng = np.random.default_rng(7)
    requests = []
    for index in range(num_requests):
        length = int(rng.integers(*PROMPT_LENGTHS))
        start = int(rng.integers(len(text) - length))
        seed = int(rng.integers(1 << 64, dtype=np.uint64))
        sampling = SamplingParams(max_tokens=num_tokens, seed=seed, top_p=0.95 if index % 2 else 1.0, ignore_eos=True)
        requests.append(Request(tuple(text[start : start + length]), sampling))
    return requests


def outputs(model: Model, requests: Sequence[Request], batch: int, num_tokens: int) -> list[list[int]]:
    """The requests' tokens, computed `batch` at a time."""
    all_tokens = []
    for first in range(0, len(requests), batch):
        members = requests[first : first + batch]
        front = Front(model.runner, model.num_blocks)
        for row, request in enumerate(members):
            front.add(row, 0, sampling=request.sampling)
        tokens: list[list[int]] = [[] for _ in members]
        for segments in _steps(front, members, num_tokens):
            for token in model.runner.launch(StepPlan(0, segments)).result().sampled:
                assert not token.error, token
                tokens[token.row].append(token.token_id)
        for row in range(len(members)):
            front.remove(row)
        all_tokens += tokens
    return all_tokens


def _steps(front: Front, members: Sequence[Request], num_tokens: int) -> Iterator[list[Segment]]:
    """Whole prompts, as many as fit into a step, then one token of every row at a time."""
    segments: list[Segment] = []
    for row, request in enumerate(members):
        if sum(segment.num_tokens for segment in segments) + len(request.prompt) > MAX_STEP_TOKENS:
            yield segments
            segments = []
        segments.append(front.segment(row, list(request.prompt)))
    yield segments
    for _ in range(num_tokens - 1):
        yield [front.segment(row) for row in range(len(members))]


def measure(model: Model, requests: Sequence[Request], batch: int, num_tokens: int) -> dict[str, Agreement]:
    """Draws are checked, then outputs compared; by kind of sampling, and the control."""
    samplings = [request.sampling for request in requests]
    num_draws = check_draws(model.device, model.vocab_size, samplings, batch, num_tokens)
    print(f"{model.name}: {num_draws} draws have the numbers of their counters, alone and {batch} at once", flush=True)
    begun = time.perf_counter()
    alone = outputs(model, requests, 1, num_tokens)
    assert outputs(model, requests[:4], 1, num_tokens) == alone[:4], "alone, the same requests gave other tokens"
    together, again = (outputs(model, requests, batch, num_tokens) for _ in range(2))
    print(f"{model.name}: computed in {time.perf_counter() - begun:.1f} s", flush=True)
    found = {
        name: compare(alone[kind::2], together[kind::2]) for kind, name in enumerate(("temperature 1", "top-p 0.95"))
    }
    return found | {"the same batch again": compare(together, again)}


def shipped_model(device: torch.device, batch: int, num_tokens: int) -> tuple[Model, list[int]]:
    """In float32; and the tokens of a Python module."""
    config = read_model_config(SHIPPED)
    decoder = Decoder.load(SHIPPED, config, torch.float32, device, TensorParallelGroup.single())
    tokenizer = tokenizers.Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    text: list[int] = tokenizer.encode(inspect.getsource(argparse)).ids
    return make_model("shipped checkpoint, float32", decoder, batch, num_tokens), text


def drawn_model(device: torch.device, layers: int, batch: int, num_tokens: int) -> tuple[Model, list[int]]:
    """Random weights in bfloat16; and random tokens."""
    if device.type == "cuda":
        name, config = f"8B shape, {layers} layers", read_shape("llama-3.1-8b", layers)
    else:
        name, config = "the shipped shape", read_model_config(SHIPPED)
    decoder = random_decoder(config, device)
    text = np.random.default_rng(3).integers(config.vocab_size, size=20_000).tolist()
    return make_model(f"{name}, random weights, bfloat16", decoder, batch, num_tokens), text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--requests", type=int, default=256, help="half of them with top-p (256)")
    add("--batch", type=int, default=64, help="requests that are computed at once (64)")
    add("--tokens", type=int, default=32, help="of each output (32)")
    add("--layers", type=int, default=4, help="of the 8B shape; 0: the shipped checkpoint only (4)")
    add("--cpu", action="store_true", help="even if there is a GPU")
    add("--out", type=Path, help="a JSON file")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() and not args.cpu else "cpu")
    print(
        f"{device_name(device)}: {args.requests} seeded requests, {args.tokens} tokens, alone and {args.batch} at once"
    )
    results: dict[str, object] = {"device": device_name(device), "batch": args.batch}
    makers = [partial(shipped_model, device), *([partial(drawn_model, device, args.layers)] if args.layers else [])]
    for make in makers:
        model, text = make(args.batch, args.tokens)
        found = measure(model, make_requests(text, args.requests, args.tokens), args.batch, args.tokens)
        print(HEADER)
        for name, agreement in found.items():
            print(agreement.markdown(name), flush=True)
        results[model.name] = {name: agreement.figures() for name, agreement in found.items()}
    if args.out:
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
