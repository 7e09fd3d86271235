"""The tensor-parallel ranks of one worker and the collectives between them; a group of one does nothing.

Ranks of one host use memory that they share, on GPUs as on CPUs; elsewhere GPUs use NCCL and CPUs gloo. A group
holds no global state. Knows neither models nor requests.
"""

from __future__ import annotations

import importlib
import os
import socket
from datetime import timedelta
from typing import Final, Protocol, cast, runtime_checkable

import torch
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from common.errors import InvalidArgument, Unavailable
from common.parallel.process_group import LOOPBACK, ProcessGroupCollectives
from common.parallel.shared_memory import SharedMemoryCollectives, shared_memory_works

_FILE: Final = "file://"
_SYMMETRIC_MEMORY: Final = "common.parallel.symmetric_memory"


class Collectives(Protocol):
    """How ranks exchange tensors. A peer that is gone or late is a `RuntimeError`."""

    def all_reduce(self, tensor: torch.Tensor, /) -> None: ...

    def all_gather(self, tensor: torch.Tensor, gathered: torch.Tensor, /) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class FusedCollectives(Protocol):
    """Collectives that can do in the same kernel what follows them in a layer."""

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, /
    ) -> torch.Tensor | None: ...


class TensorParallelGroup:
    """One rank's view. Every rank must make the same calls in the same order, all from one thread each."""

    def __init__(self, rank: int, size: int, collectives: Collectives | None) -> None:
        assert (collectives is None) == (size == 1), "a group of one exchanges nothing"
        self.rank = rank
        self.size = size
        self._collectives = collectives
        self._fused = collectives if isinstance(collectives, FusedCollectives) else None

    @classmethod
    def single(cls) -> TensorParallelGroup:
        """The group of one rank."""
        return cls(0, 1, None)

    @classmethod
    def open(
        cls,
        rank: int,
        size: int,
        address: str,
        device: torch.device,
        timeout_s: float,
        use_shared_memory: bool = True,
    ) -> TensorParallelGroup:
        """Meet the other ranks at `address` (`host:port`, served by rank 0, or `file:///path`).

        `timeout_s` bounds the meeting and every collective but those over GPU memory: there a lost rank leaves the
        others waiting until their process ends. `use_shared_memory`: if the host allows; all ranks must run on it, one
        per GPU. Raises `Unavailable` if a rank does not come.
        """
        if size == 1:
            return cls.single()
        try:
            store = PrefixStore("baton-tp", _store(rank, size, address, timeout_s))
            if device.type == "cpu" and use_shared_memory and shared_memory_works():
                return cls(rank, size, SharedMemoryCollectives(rank, size, store, timeout_s))
            if device.type == "cuda" and use_shared_memory and _gpus_share_memory(size, device):
                return cls(rank, size, _over_symmetric_memory(rank, size, store, device, timeout_s))
            host = LOOPBACK if address.startswith(_FILE) else _split(address)[0]
            return cls(rank, size, ProcessGroupCollectives(rank, size, store, device, timeout_s, host))
        except (RuntimeError, OSError) as error:
            raise Unavailable(f"rank {rank} of {size} could not meet the others at {address}: {error}") from error

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place: the same bits on every rank. tensor: contiguous.

        Raises `Unavailable` if a rank is gone.
        """
        if self._collectives is not None:
            try:
                self._collectives.all_reduce(tensor)
            except RuntimeError as error:
                raise Unavailable(f"all-reduce on rank {self.rank} failed: {error}") from error
        return tensor

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor | None:
        """Sum `x` over the ranks, add that to `residual` in place and return its norm, where one kernel can do it all.

        x, residual: [T, n], contiguous; weight: [n]. None, and nothing done, where it takes `all_reduce` and then
        `add_rms_norm`. The answer depends on the shape alone, so it is the same on every rank.
        """
        return None if self._fused is None else self._fused.all_reduce_add_rms_norm(x, residual, weight, eps)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[...] on every rank → [size, ...] on every rank, in rank order. Raises `Unavailable` if a rank is gone."""
        if self._collectives is None:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty((self.size, *tensor.shape))
        try:
            self._collectives.all_gather(tensor.contiguous(), gathered)
        except RuntimeError as error:
            raise Unavailable(f"all-gather on rank {self.rank} failed: {error}") from error
        return gathered

    def close(self) -> None:
        """Leave the group; idempotent. Collectives after this are an error."""
        if self._collectives is not None:
            self._collectives.close()


def _gpus_share_memory(size: int, device: torch.device) -> bool:
    """Whether every GPU from 0 to `size` can be read and written by this one."""
    others = (index for index in range(size) if index != device.index)
    return torch.cuda.device_count() >= size and all(
        torch.cuda.can_device_access_peer(device, index) for index in others
    )


def _over_symmetric_memory(rank: int, size: int, store: Store, device: torch.device, timeout_s: float) -> Collectives:
    """Imported when first asked for: where there is no GPU there may be no Triton."""
    module = importlib.import_module(_SYMMETRIC_MEMORY)
    return cast(Collectives, module.SymmetricMemoryCollectives(rank, size, store, device, timeout_s))


def _store(rank: int, size: int, address: str, timeout_s: float) -> Store:
    """Where the ranks meet."""
    timeout = timedelta(seconds=timeout_s)
    if address.startswith(_FILE):
        store: Store = FileStore(address.removeprefix(_FILE), size)
        store.set_timeout(timeout)
        return store
    host, port = _split(address)
    if rank:
        return TCPStore(host, port, size, is_master=False, timeout=timeout, wait_for_workers=False)
    # Left to itself it listens on every interface, and whoever reaches it may read and write.
    with socket.create_server((host, port), backlog=size) as listening:
        descriptor = os.dup(listening.fileno())  # the store's own from here on
    return TCPStore(
        host, port, size, is_master=True, timeout=timeout, wait_for_workers=False, master_listen_fd=descriptor
    )


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidArgument("group_address", address, "must be host:port or file:///path")
    return host, int(port)
