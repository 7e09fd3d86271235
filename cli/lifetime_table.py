"""Prints where the time of a request went, from the `Lifetime` that its last message carried."""

from __future__ import annotations

from baton.v1 import inference_pb2
from rich.console import Console
from rich.table import Table

_MS = 1e6
_PHASES = (
    ("queue", "queue_ns", "waiting in the router and for prefill"),
    ("prefill", "prefill_ns", "first chunk to first token"),
    ("grant", "grant_ns", "waiting for staging slots, partly while computing"),
    ("transfer", "transfer_ns", "gather and bytes on the wire"),
    ("verify", "verify_ns", "digest check and scatter"),
    ("exposed", "exposed_handoff_ns", "first token sampled to hand-off done"),
    ("decode queue", "decode_queue_ns", "hand-off done to first decode step"),
    ("decode", "decode_ns", "first decode step to last token"),
)


def time_per_output_token_ms(lifetime: inference_pb2.Lifetime, num_output_tokens: int) -> float | None:
    """TPOT in milliseconds: mean gap after the first token; None for fewer than two tokens."""
    if num_output_tokens < 2:
        return None
    return (lifetime.total_ns - lifetime.time_to_first_token_ns) / _MS / (num_output_tokens - 1)


def print_lifetime(
    console: Console,
    lifetime: inference_pb2.Lifetime,
    usage: inference_pb2.Usage,
    num_output_tokens: int,
    of_which: str = "",
) -> None:
    """Print phases, hand-off and totals of one choice with `num_output_tokens` tokens. `of_which` ends the titles."""
    phases = Table(title=f"lifetime{of_which}", title_justify="left")
    for heading in ("phase", "ms", "what it is"):
        phases.add_column(heading, justify="right" if heading == "ms" else "left")
    for name, field, meaning in _PHASES:
        phases.add_row(name, f"{getattr(lifetime, field) / _MS:.2f}", meaning)
    console.print(phases)

    tpot = time_per_output_token_ms(lifetime, num_output_tokens)
    totals = Table(title=f"totals{of_which}", title_justify="left", show_header=False)
    totals.add_row("TTFT", f"{lifetime.time_to_first_token_ns / _MS:.2f} ms")
    totals.add_row("TPOT", "-" if tpot is None else f"{tpot:.2f} ms")
    totals.add_row("total", f"{lifetime.total_ns / _MS:.2f} ms")
    totals.add_row("prompt tokens", f"{usage.num_prompt_tokens} ({lifetime.num_cached_tokens} cached)")
    totals.add_row("output tokens", str(num_output_tokens))
    totals.add_row(
        "blocks",
        f"{lifetime.num_blocks_shipped} shipped, {lifetime.num_blocks_reused} held by decode already",
    )
    totals.add_row("bytes shipped", f"{lifetime.bytes_shipped:,}")
    totals.add_row("chunks sent again", str(lifetime.num_chunks_resent))
    totals.add_row("transport", lifetime.transport or "-")
    totals.add_row("workers", f"{lifetime.prefill_worker} → {lifetime.decode_worker}")
    totals.add_row("migrations", str(lifetime.num_migrations))
    console.print(totals)
