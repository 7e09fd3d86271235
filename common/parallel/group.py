"""The tensor-parallel ranks of one worker and the collectives between them; a group of one does nothing.

A group owns its store and its process group: there is no global state, so several groups can live in one process.
Knows neither models nor requests.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore, PrefixStore, Store, TCPStore

from common.errors import InvalidArgument, Unavailable


class _Work(Protocol):
    def wait(self) -> object: ...


class _Collectives(Protocol):
    """What is used of gloo's and NCCL's process groups, which torch's stubs leave out."""

    def allreduce(self, tensors: list[torch.Tensor], options: dist.AllreduceOptions, /) -> _Work: ...

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], /) -> _Work: ...

    def shutdown(self) -> None: ...


class TensorParallelGroup:
    """One rank's view. Every rank must make the same calls in the same order, all from one thread each."""

    def __init__(self, rank: int, size: int, process_group: _Collectives | None) -> None:
        assert (process_group is None) == (size == 1), "a group of one needs no process group"
        self.rank = rank
        self.size = size
        self._process_group = process_group
        self._reduce = dist.AllreduceOptions()

    @classmethod
    def single(cls) -> TensorParallelGroup:
        """The group of one rank."""
        return cls(0, 1, None)

    @classmethod
    def open(cls, rank: int, size: int, address: str, device: torch.device, timeout_s: float) -> TensorParallelGroup:
        """Meet the other ranks at `address` (`host:port`, served by rank 0, or `file:///path`).

        `timeout_s` bounds the meeting and every collective. Raises `Unavailable` if a rank does not come.
        """
        if size == 1:
            return cls.single()
        timeout = timedelta(seconds=timeout_s)
        try:
            return cls(rank, size, _process_group(rank, size, address, device, timeout))
        except RuntimeError as error:
            raise Unavailable(f"rank {rank} of {size} could not meet the others at {address}: {error}") from error

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over the ranks, in place: the same bits on every rank. Raises `Unavailable` if a rank is gone."""
        if self._process_group is None:
            return tensor
        try:
            self._process_group.allreduce([tensor], self._reduce).wait()
        except RuntimeError as error:
            raise Unavailable(f"all-reduce on rank {self.rank} failed: {error}") from error
        return tensor

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[...] on every rank → [size, ...] on every rank, in rank order."""
        if self._process_group is None:
            return tensor.unsqueeze(0)
        gathered = tensor.new_empty((self.size, *tensor.shape))
        try:
            self._process_group.allgather([list(gathered.unbind())], [tensor.contiguous()]).wait()
        except RuntimeError as error:
            raise Unavailable(f"all-gather on rank {self.rank} failed: {error}") from error
        return gathered

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_reduce(torch.zeros(1))

    def close(self) -> None:
        """Leave the group; idempotent. Collectives after this are an error."""
        if self._process_group is not None:
            self._process_group.shutdown()


def _store(rank: int, size: int, address: str, timeout: timedelta) -> Store:
    if address.startswith("file://"):
        return FileStore(address.removeprefix("file://"), size)
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidArgument("group_address", address, "must be host:port or file:///path")
    return TCPStore(host, int(port), size, is_master=rank == 0, timeout=timeout, wait_for_workers=False)


def _process_group(rank: int, size: int, address: str, device: torch.device, timeout: timedelta) -> _Collectives:
    store = PrefixStore("baton-tp", _store(rank, size, address, timeout))
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return cast(_Collectives, dist.ProcessGroupNCCL(store, rank, size, options))
    return cast(_Collectives, dist.ProcessGroupGloo(store, rank, size, timeout))
