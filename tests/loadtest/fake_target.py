"""A target in memory whose answers take exactly the time that a test gives them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from common.errors import BatonError
from loadtest.targets.base import Account, ModelInfo, Target


class Body(msgspec.Struct):
    """What the fake sends."""

    request_id: str
    token_ids: list[int]
    max_tokens: int


@dataclass
class FakeTarget(Target):
    """One token every `gap_s`, the first after `first_s`; then `error`, if there is one."""

    first_s: float = 0.1
    gap_s: float = 0.01
    error: BatonError | None = None
    account: Account = field(default_factory=Account)
    bodies: list[Body] = field(default_factory=list)  # in the order in which they were sent
    num_open: int = 0
    most_open: int = 0

    async def describe(self) -> ModelInfo:
        return ModelInfo("fake", 1000, 1000)

    def prepare(self, request_id: str, token_ids: list[int], max_tokens: int) -> bytes:
        return msgspec.json.encode(Body(request_id, token_ids, max_tokens))

    async def generate(self, body: bytes, timeout_s: float, on_tokens: Callable[[int], None]) -> Account:
        request = msgspec.json.decode(body, type=Body)
        self.bodies.append(request)
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            for position in range(request.max_tokens):
                await asyncio.sleep(self.gap_s if position else self.first_s)
                on_tokens(1)
            if self.error is not None:
                raise self.error
            return self.account
        finally:
            self.num_open -= 1
