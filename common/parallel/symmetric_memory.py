"""Collectives between GPUs of one host that map each other's memory; NCCL for what is too large for that.

    memory of a rank: | staging for torch's kernels | regions and flags of our own kernel (`triton_all_reduce`) |

Up to `small_bytes`, one kernel of ours writes its part, meets the others and sums all parts. Up to `staging_bytes`,
torch's two-shot kernel does. Everything can be captured into a CUDA graph. Knows neither models nor requests.
"""

from __future__ import annotations

import itertools
import os
from typing import Final

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import (
    PrefixStore,
    Store,
    _register_process_group,
    _SymmetricMemory,
    _unregister_process_group,
)

from common.parallel import triton_all_reduce
from common.parallel.process_group import ProcessGroupCollectives
from common.parallel.triton_all_reduce import PeerMemory

# Up to where one kernel that reads everything from everybody is ahead; measured for two ranks, see docs/performance.md.
SMALL_BYTES_OF_TWO: Final = triton_all_reduce.MAX_BYTES
SMALL_BYTES: Final = 256 << 10
DEFAULT_STAGING_BYTES: Final = 32 << 20
_DTYPES: Final = (torch.bfloat16, torch.float32)
_ALIGNMENT: Final = 16
_numbers = itertools.count()


class SymmetricMemoryCollectives:
    """One rank's view. All ranks must be processes of one host. `RuntimeError` if a rank does not come."""

    def __init__(
        self,
        rank: int,
        size: int,
        store: Store,
        device: torch.device,
        timeout_s: float,
        staging_bytes: int = DEFAULT_STAGING_BYTES,
    ) -> None:
        # The kernels used here need no multicast objects, whose loss can take a host's GPUs out of service.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        self.small_bytes = SMALL_BYTES_OF_TWO if size == 2 else SMALL_BYTES
        self._large = ProcessGroupCollectives(rank, size, store, device, timeout_s)
        self._name = f"baton-symmetric-{next(_numbers)}"
        # torch finds a group by name, in one of two registries depending on its release. Both forget it if we do.
        group_store = PrefixStore(self._name, store)
        self._group = dist.ProcessGroup(group_store, rank, size)
        _register_process_group(self._name, self._group)  # type: ignore[arg-type]
        _SymmetricMemory.set_group_info(self._name, rank, size, group_store)
        num_bytes = staging_bytes + triton_all_reduce.PEER_BYTES
        self._memory = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device, self._name)
        self._memory.zero_()
        handle = _SymmetricMemory.rendezvous(self._memory, self._name)
        self._staging = self._memory[:staging_bytes]
        self._peers = PeerMemory.of(rank, [address + staging_bytes for address in handle.buffer_ptrs], device)
        self._meet(device)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum over the ranks, in place. tensor: contiguous."""
        fits = tensor.dtype in _DTYPES and tensor.data_ptr() % _ALIGNMENT == 0 and tensor.nbytes % _ALIGNMENT == 0
        if fits and tensor.nbytes <= self.small_bytes:
            triton_all_reduce.all_reduce(tensor, self._peers)
        elif fits and tensor.nbytes <= self._staging.nbytes:
            self._two_shot(tensor)
        else:
            self._large.all_reduce(tensor)

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
    ) -> torch.Tensor | None:
        """Sum `x` over the ranks, add it to `residual` in place and return the norm of that, in one kernel.

        x, residual: [T, n], contiguous; weight: [n]. None, and nothing done, where two kernels are needed.
        """
        if not triton_all_reduce.fits(x):
            return None
        return triton_all_reduce.all_reduce_add_rms_norm(x, residual, weight, eps, self._peers)

    def all_gather(self, tensor: torch.Tensor, gathered: torch.Tensor) -> None:
        """tensor: [...], contiguous; gathered: [size, ...], written."""
        self._large.all_gather(tensor, gathered)

    def close(self) -> None:
        _unregister_process_group(self._name)  # type: ignore[arg-type]
        self._large.close()

    def _two_shot(self, tensor: torch.Tensor) -> None:
        part = self._staging.view(tensor.dtype)[: tensor.numel()]
        part.copy_(tensor.view(-1))
        torch.ops.symm_mem.two_shot_all_reduce_out(part, "sum", self._name, tensor.view(-1))

    def _meet(self, device: torch.device) -> None:
        """No rank goes on before the memory of all is zero."""
        torch.cuda.synchronize(device)
        self._large.all_reduce(torch.zeros(1, device=device))
        torch.cuda.synchronize(device)
