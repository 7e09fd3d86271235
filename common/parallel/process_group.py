"""Collectives through torch's process groups: NCCL between GPUs, gloo where ranks share no memory.

Used as objects rather than through `torch.distributed`'s global state, so that several groups can live in one process.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Final, Protocol, cast

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

LOOPBACK: Final = "127.0.0.1"


class _Work(Protocol):
    def wait(self) -> object: ...


class _Backend(Protocol):
    """What is used of gloo's and NCCL's process groups, which torch's stubs leave out."""

    def allreduce(self, tensors: list[torch.Tensor], options: dist.AllreduceOptions, /) -> _Work: ...

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], /) -> _Work: ...

    def shutdown(self) -> None: ...


class ProcessGroupCollectives:
    """One rank's view. A collective that fails or takes longer than `timeout_s` raises `RuntimeError`. `host` is where
    gloo listens for the other ranks: left to itself, it takes what the machine's name stands for."""

    def __init__(
        self, rank: int, size: int, store: Store, device: torch.device, timeout_s: float, host: str = LOOPBACK
    ) -> None:
        timeout = timedelta(seconds=timeout_s)
        self._options = dist.AllreduceOptions()
        if device.type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = timeout
            self._backend = cast(_Backend, dist.ProcessGroupNCCL(store, rank, size, options))
        else:
            gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
            gloo._timeout = timeout
            self._backend = cast(_Backend, dist.ProcessGroupGloo(store, rank, size, gloo))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks, in place."""
        self._backend.allreduce([tensor], self._options).wait()

    def all_gather(self, tensor: torch.Tensor, gathered: torch.Tensor) -> None:
        """tensor: [...], contiguous; gathered: [size, ...], written."""
        self._backend.allgather([list(gathered.unbind())], [tensor]).wait()

    def close(self) -> None:
        self._backend.shutdown()
