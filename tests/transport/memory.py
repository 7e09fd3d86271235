"""Where the buffers of a transport test live, and what the two ends put into them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.transport.traffic import MIB, canary, pattern

CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Memory:
    """The device of the end that connects and of the end that is connected to; how large a slow message is."""

    connecting: torch.device
    accepting: torch.device
    big_bytes: int

    def pattern(self, num_bytes: int, seed: int, accepting: bool = False) -> torch.Tensor:
        """What the connecting end sends, unless told otherwise: uint8 [num_bytes]."""
        return pattern(num_bytes, seed, self.accepting if accepting else self.connecting)

    def canary(self, num_bytes: int, accepting: bool = True) -> torch.Tensor:
        """What the accepting end receives into, unless told otherwise: uint8 [num_bytes]."""
        return canary(num_bytes, self.accepting if accepting else self.connecting)


HOST = Memory(CPU, CPU, 12 * MIB)
# A gigabyte takes NVLink some milliseconds: time enough to meet a transfer while it is under way.
TWO_GPUS = Memory(torch.device("cuda", 0), torch.device("cuda", 1), 1024 * MIB)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same, wherever they are."""
    return torch.equal(one.cpu(), other.cpu()) if one.device != other.device else torch.equal(one, other)
