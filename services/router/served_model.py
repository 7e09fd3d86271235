"""What the router needs of a checkpoint: its limits, and how text becomes token ids and back. No weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.router.validation import ModelLimits


class Detokenizer(Protocol):
    """Token ids of one output to text, a piece at a time."""

    def push(self, ids: Sequence[int]) -> str:
        """New text; never ends inside a character."""
        ...

    def flush(self) -> str:
        """What is left at the end."""
        ...


class StopMatcher(Protocol):
    """Watches one output for its stop strings."""

    def push(self, delta: str) -> tuple[str, bool]:
        """Text that may go to the client, and whether a stop string is complete."""
        ...

    def flush(self) -> str:
        """Text that was held back because it might have become a stop string."""
        ...


class TextCodec(Protocol):
    """A checkpoint's tokenizer and chat template."""

    def encode(self, text: str) -> list[int]:
        """Token ids with the tokenizer's special tokens."""
        ...

    def encode_chat(self, messages: Sequence[tuple[str, str]], add_generation_prompt: bool) -> list[int]:
        """Token ids of a rendered conversation of (role, content). Raises `InvalidArgument`."""
        ...

    def detokenizer(self) -> Detokenizer:
        """For one output."""
        ...

    def stop_matcher(self, stops: Sequence[str], include_stop: bool) -> StopMatcher:
        """For one output; `include_stop` keeps the stop string in the text."""
        ...


@dataclass(frozen=True, slots=True)
class ServedModel:
    """The one model that a router serves."""

    limits: ModelLimits
    codec: TextCodec
