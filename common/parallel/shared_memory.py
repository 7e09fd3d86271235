"""Collectives between CPU ranks of one host through memory that they share: gloo's sockets cost more than the model.

    memory: | per rank, 64 bytes: steps published, then whether it left | slots [2][size][SLOT_BYTES] |

In step n a rank writes its part to its own slot n mod 2, publishes n, waits until all have published n, and reads all
slots. Nobody can write to a slot again before step n + 2, which starts after all have published n + 1 and hence read n.
Relies on stores becoming visible in order, as x86 guarantees. Every rank adds in rank order, so sums are bit-identical.
"""

from __future__ import annotations

import mmap
import os
import platform
import sys
import time
from typing import Final

import torch
from torch._C._distributed_c10d import Store

SLOT_BYTES: Final = 1 << 20
_LINE_BYTES: Final = 64  # a cache line per rank, so that waiting on one does not slow down another
_LINE_WORDS: Final = _LINE_BYTES // 8
_SPINS: Final = 50  # about ten microseconds before the core is offered to others
_YIELDS: Final = 20_000  # some ten milliseconds before waiting costs no time at all
_PAUSE_S: Final = 0.0005


def shared_memory_works() -> bool:
    """Whether this host orders stores as needed and can share anonymous memory."""
    return sys.platform == "linux" and platform.machine() == "x86_64"


class SharedMemoryCollectives:
    """One rank's view. A collective whose peer left or is late raises `RuntimeError`. Tensors are in host memory."""

    def __init__(self, rank: int, size: int, store: Store, timeout_s: float) -> None:
        self._rank = rank
        self._peers = [peer for peer in range(size) if peer != rank]
        self._timeout_s = timeout_s
        self._step = 0
        self._store = store  # rank 0 serves it to the others: it lives as long as the group
        memory = _shared_memory(rank, size, store)
        self._words = memoryview(memory).cast("q")
        slots = torch.frombuffer(memory, dtype=torch.uint8, offset=size * _LINE_BYTES)
        self._slots = slots.view(2, size, SLOT_BYTES)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks, in place. tensor: contiguous."""
        for piece in torch.split(tensor.view(-1), SLOT_BYTES // tensor.itemsize):
            parts = self._exchange(piece)
            torch.add(parts[0], parts[1], out=piece)
            for part in parts[2:]:
                piece.add_(part)

    def all_gather(self, tensor: torch.Tensor, gathered: torch.Tensor) -> None:
        """tensor: [...], contiguous; gathered: [size, ...], written."""
        num_elements = SLOT_BYTES // tensor.itemsize
        columns = torch.split(gathered.view(gathered.shape[0], -1), num_elements, dim=1)
        for piece, column in zip(torch.split(tensor.view(-1), num_elements), columns, strict=True):
            column.copy_(self._exchange(piece))

    def close(self) -> None:
        """Tell the others that this rank takes part no more."""
        self._words[self._rank * _LINE_WORDS + 1] = 1

    def _exchange(self, piece: torch.Tensor) -> torch.Tensor:
        """piece: [n], at most a slot. Returns every rank's piece, [size, n], valid until the next exchange."""
        self._step += 1
        parts = self._slots[self._step % 2, :, : piece.nbytes].view(piece.dtype)
        parts[self._rank].copy_(piece)
        self._words[self._rank * _LINE_WORDS] = self._step
        for peer in self._peers:
            self._wait_for(peer)
        return parts

    def _wait_for(self, peer: int) -> None:
        words, place, step = self._words, peer * _LINE_WORDS, self._step
        for _ in range(_SPINS):
            if words[place] >= step:
                return
        deadline_s = time.monotonic() + self._timeout_s
        yields = 0
        while True:
            has_left = words[place + 1]  # read first: a peer publishes before it leaves
            if words[place] >= step:
                return
            if has_left:
                raise RuntimeError(f"rank {peer} left")
            if time.monotonic() > deadline_s:
                raise RuntimeError(f"rank {peer} did not come within {self._timeout_s} s")
            yields += 1
            os.sched_yield()
            if yields > _YIELDS:
                time.sleep(_PAUSE_S)


def _shared_memory(rank: int, size: int, store: Store) -> mmap.mmap:
    """The same zeroed memory on every rank; it has no name in the file system, so nothing is left behind."""
    num_bytes = size * _LINE_BYTES + 2 * size * SLOT_BYTES
    if rank == 0:
        file = os.memfd_create("baton-tp", os.MFD_CLOEXEC)
        os.ftruncate(file, num_bytes)
        store.set("memory", f"/proc/{os.getpid()}/fd/{file}")
    else:
        file = os.open(store.get("memory").decode(), os.O_RDWR | os.O_CLOEXEC)
    memory = mmap.mmap(file, num_bytes)
    if store.add("mapped", 1) == size:
        store.set("all mapped", "")
    store.wait(["all mapped"])
    os.close(file)
    return memory
