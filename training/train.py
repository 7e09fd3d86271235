"""Trains the checkpoint on the encoded shards; writes it in the Hugging Face layout (bfloat16 safetensors).

It stops at --steps or --minutes, whichever is first; the learning rate follows the nearer one.
Run: python -m training.train --device cuda --compile --minutes 6        (smoke: --device cpu --steps 2)
"""

import argparse
import json
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from training.batches import LONG, SHORT, Mixture, Stream, draw
from training.llama import Llama, LlamaShape, rotary_tables

WARMUP_STEPS = 200
LAST_RATE_SHARE = 0.02
EVALUATE_EVERY_STEPS = 1000
LOG_EVERY_STEPS = 99
"""Odd, so that both kinds of batch show."""
VALIDATION_TOKENS = 1024
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Plan:
    """How long and how fast to train. `minutes` includes compilation."""

    steps: int
    minutes: float
    peak_rate: float
    seed: int
    batch_divisor: int

    def progress(self, step: int, started_s: float) -> float:
        """0 at the start, 1 when the first of the two limits is reached."""
        return max(step / self.steps, (time.monotonic() - started_s) / (60 * self.minutes))

    def rate(self, step: int, progress: float) -> float:
        """Learning rate: linear warm-up, then a cosine down to LAST_RATE_SHARE of the peak."""
        cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        share = LAST_RATE_SHARE + (1 - LAST_RATE_SHARE) * cosine
        return self.peak_rate * share * min(1.0, (step + 1) / WARMUP_STEPS)


@dataclass(frozen=True, slots=True)
class Data:
    """The four streams."""

    code: Stream
    chat: Stream
    code_validation: Stream
    chat_validation: Stream

    @staticmethod
    def load(corpus: Path, device: torch.device) -> "Data":
        """Read the shards of `corpus` onto `device`."""
        names = ("code_train", "chat_train", "code_validation", "chat_validation")
        return Data(*(Stream.load(corpus / f"{name}.npy", device) for name in names))


def precision(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 matrix products on an accelerator, plain float32 on the CPU."""
    return nullcontext() if device.type == "cpu" else torch.autocast(device.type, dtype=torch.bfloat16)


@torch.no_grad()
def evaluate(model: Llama, loss_of: Loss, stream: Stream, max_windows: int) -> float:
    """Mean loss (nats a token) over evenly spaced windows, without dropout."""
    model.eval()
    stride = max(VALIDATION_TOKENS, len(stream.ids) // max_windows)
    offsets = torch.arange(0, max(1, len(stream.ids) - VALIDATION_TOKENS), stride, device=stream.ids.device)
    groups = torch.split(offsets, 16)
    losses = [float(loss_of(*stream.window(group, VALIDATION_TOKENS))) for group in groups]
    sizes = [len(group) for group in groups]
    model.train()
    return sum(loss * size for loss, size in zip(losses, sizes, strict=True)) / sum(sizes)


def report(model: Llama, loss_of: Loss, data: Data, max_windows: int) -> dict[str, float]:
    """Losses on both sources, seen and held out."""
    streams = {
        "code_train": data.code,
        "code_validation": data.code_validation,
        "chat_train": data.chat,
        "chat_validation": data.chat_validation,
    }
    return {name: round(evaluate(model, loss_of, stream, max_windows), 4) for name, stream in streams.items()}


def optimizer_for(model: Llama, plan: Plan) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    gains = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": gains, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=plan.peak_rate, betas=(0.9, 0.95))


def train(model: Llama, train_loss: Loss, eval_loss: Loss, data: Data, plan: Plan) -> dict[str, float]:
    """Train `model` in place; returns the number of steps, tokens and seconds."""
    started_s = time.monotonic()
    generator = torch.Generator(data.code.ids.device).manual_seed(plan.seed)
    optimizer = optimizer_for(model, plan)
    mixtures = [replace(m, num_windows=max(1, m.num_windows // plan.batch_divisor)) for m in (LONG, SHORT)]
    num_tokens = step = 0
    while (progress := plan.progress(step, started_s)) < 1.0:
        mixture: Mixture = mixtures[step % 2]
        for group in optimizer.param_groups:
            group["lr"] = plan.rate(step, progress)
        loss = train_loss(*draw(mixture, data.code, data.chat, generator))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        num_tokens += mixture.num_windows * mixture.num_tokens
        step += 1
        if step % LOG_EVERY_STEPS == 0 or step <= 2:
            # Reading the loss also waits for the device, so that the clock above is not ahead of the work.
            kind = "long" if mixture.num_tokens == LONG.num_tokens else "short"
            seconds = time.monotonic() - started_s
            print(
                f"step {step} {kind} loss {loss.item():.4f} {num_tokens / 1e6:.1f} M tokens {seconds:.0f} s",
                flush=True,
            )
        if step % EVALUATE_EVERY_STEPS == 0:
            print(f"step {step} {json.dumps(report(model, eval_loss, data, 32))}", flush=True)
    return {"steps": step, "tokens": num_tokens, "seconds": round(time.monotonic() - started_s, 1)}


def round_to_bfloat16(model: Llama) -> dict[str, Tensor]:
    """Round the parameters in place to what the file will hold; returns the file's tensors on the CPU."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    return {name: p.detach().to("cpu", torch.bfloat16).contiguous() for name, p in model.named_parameters()}


def save(out: Path, shape: LlamaShape, tensors: dict[str, Tensor], summary: dict[str, object]) -> None:
    """Write weights, configs and the record of the run into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    generation = {"bos_token_id": None, "eos_token_id": [0, 3], "pad_token_id": 0, "do_sample": False}
    files = {"config.json": shape.hf_config(), "generation_config.json": generation, "training.json": summary}
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, default=Path("build/corpus"))
    parser.add_argument("--out", type=Path, default=Path("checkpoints/pystdlib-7m"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--peak-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--batch-divisor", type=int, default=1, help="take fewer windows a batch")
    arguments = parser.parse_args()
    plan = Plan(arguments.steps, arguments.minutes, arguments.peak_rate, arguments.seed, arguments.batch_divisor)

    torch.manual_seed(plan.seed)
    torch.set_float32_matmul_precision("high")
    device = torch.device(arguments.device)
    shape = LlamaShape()
    model = Llama(shape).to(device)
    cos, sin = rotary_tables(shape, device)
    compiled = torch.compile(model, dynamic=False) if arguments.compile else model

    def train_loss(ids: Tensor, targets: Tensor) -> Tensor:
        with precision(device):
            return compiled(ids, targets, cos, sin)  # type: ignore[no-any-return]

    def eval_loss(ids: Tensor, targets: Tensor) -> Tensor:
        with precision(device):  # not compiled: few batches, and each shape would cost a compilation
            return model(ids, targets, cos, sin)  # type: ignore[no-any-return]

    data = Data.load(arguments.corpus, device)
    amounts = train(model, train_loss, eval_loss, data, plan)
    tensors = round_to_bfloat16(model)
    max_windows = 512 // plan.batch_divisor
    losses = report(model, eval_loss, data, max_windows)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    num_parameters = sum(tensor.numel() for tensor in tensors.values())
    summary: dict[str, object] = {
        **amounts,
        "losses": losses,
        "parameters": num_parameters,
        "device": name,
        "torch": torch.__version__,
        "seed": plan.seed,
    }
    save(arguments.out, shape, tensors, summary)
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    main()
