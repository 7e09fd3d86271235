"""What the transport tests send, and how they wait for a moment inside a transfer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch

from common.transport.base import PostedReceive
from common.transport.posted import Receive, ReceiveState

MIB = 1 << 20
CANARY = 0xC5


def pattern(num_bytes: int, seed: int, device: torch.device = torch.device("cpu")) -> torch.Tensor:  # noqa: B008
    """Bytes that tell the messages apart, the same on every device of a kind: uint8 [num_bytes]."""
    generator = torch.Generator(device).manual_seed(seed)
    return finished(torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, device=device, generator=generator))


def canary(num_bytes: int, device: torch.device = torch.device("cpu")) -> torch.Tensor:  # noqa: B008
    return finished(torch.full((num_bytes,), CANARY, dtype=torch.uint8, device=device))


def finished(buffer: torch.Tensor) -> torch.Tensor:
    """The buffer, once its stream has written it: transports know nothing of streams.

    Waiting for the whole device would wait for transfers, which may wait for this thread's event loop.
    """
    if buffer.is_cuda:
        torch.cuda.current_stream(buffer.device).synchronize()
    return buffer


def untouched(buffer: torch.Tensor) -> bool:
    return bool((buffer == CANARY).all())


async def until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    """Turn the event loop until the condition holds."""
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)


async def until_arriving(receive: PostedReceive) -> None:
    assert isinstance(receive, Receive)
    await until(lambda: receive.state is not ReceiveState.POSTED)
    assert receive.state is ReceiveState.ARRIVING
