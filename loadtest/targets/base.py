"""The interface to a server under load: describe the model, make a request's bytes ahead of time, send them.

An implementation maps its protocol's failures onto `common.errors`; it measures nothing and decides nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import msgspec

TIMEOUT_TO_DESCRIBE_S = 10.0


class TargetSpec(msgspec.Struct, frozen=True):
    """Which server, and how to reach it."""

    kind: str  # `baton` or `openai`
    address: str  # host:port, or the base URL
    model: str = ""  # name to ask for; empty: the only one, or the first, that is served
    vocab_size: int = 0  # for a server that does not say it
    num_connections: int = 1  # of each client process


class ModelInfo(msgspec.Struct, frozen=True):
    """What is served."""

    name: str
    vocab_size: int
    context_length: int | None  # prompt and output together, in tokens; None if the server does not say
    eos_token_ids: tuple[int, ...] = ()


def fitting_all(models: Sequence[ModelInfo]) -> list[ModelInfo]:
    """The same models, each with the limits of all: what is made for one of them then suits every other."""
    contexts = [model.context_length for model in models if model.context_length is not None]
    return [
        ModelInfo(
            name=model.name,
            vocab_size=min(each.vocab_size for each in models),
            context_length=min(contexts, default=None),
            eos_token_ids=tuple(sorted({eos_id for each in models for eos_id in each.eos_token_ids})),
        )
        for model in models
    ]


class Account(msgspec.Struct, frozen=True):
    """What the server said of a request that it finished."""

    num_cached_tokens: int = 0
    lifetime_ns: dict[str, int] = msgspec.field(default_factory=dict)


class Target(ABC):
    """An open connection to one server."""

    @abstractmethod
    async def describe(self) -> ModelInfo:
        """Ask what is served; fails if the server cannot be reached or cannot serve now. Connects if need be."""

    @abstractmethod
    def prepare(self, request_id: str, token_ids: list[int], max_tokens: int) -> bytes:
        """The body of a request for exactly `max_tokens` greedy tokens. Does no I/O; called ahead of time."""

    @abstractmethod
    async def generate(self, body: bytes, timeout_s: float, on_tokens: Callable[[int], None]) -> Account:
        """Send a prepared body and call `on_tokens` with a count for every message that brings tokens, as it comes.

        Raises an error of `common.errors`. Cancelling it cancels the request on the server.
        """
