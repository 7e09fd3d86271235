"""Adds what the workers measured to an output's Lifetime. A sequence that moved adds up over its attempts, but for its
cached tokens: they are a part of its prompt, which counts once, so they are those of the first attempt."""

from __future__ import annotations

from baton.v1 import decode_pb2, inference_pb2, prefill_pb2

from services.router.sequence_receiver import Ending

_SUMMED_FIELDS = (
    "queue_ns",
    "prefill_ns",
    "grant_ns",
    "transfer_ns",
    "verify_ns",
    "num_blocks_shipped",
    "bytes_shipped",
    "num_blocks_reused",
    "num_chunks_resent",
    "exposed_handoff_ns",
)


def add_prefill(lifetime: inference_pb2.Lifetime, completed: prefill_pb2.PrefillCompleted) -> None:
    """Count one completed prefill and the hand-off after it."""
    for name in _SUMMED_FIELDS:
        setattr(lifetime, name, getattr(lifetime, name) + getattr(completed, name))
    lifetime.transport = completed.transport or lifetime.transport
    _note_cached(lifetime, completed.num_cached_tokens)


def add_local_prefill(lifetime: inference_pb2.Lifetime, prefill: decode_pb2.LocalPrefill) -> None:
    """Count one prompt that a decode worker computed itself."""
    lifetime.queue_ns += prefill.queue_ns
    lifetime.prefill_ns += prefill.prefill_ns
    _note_cached(lifetime, prefill.num_cached_tokens)


def add_decode(lifetime: inference_pb2.Lifetime, ending: Ending) -> None:
    """Count the time on one decode worker."""
    lifetime.decode_queue_ns += ending.decode_queue_ns
    lifetime.decode_ns += ending.decode_ns


def _note_cached(lifetime: inference_pb2.Lifetime, num_cached_tokens: int) -> None:
    # Later attempts send the prompt again, with tokens of the output, and find what earlier ones left in the cache.
    if not lifetime.num_migrations:
        lifetime.num_cached_tokens = num_cached_tokens
