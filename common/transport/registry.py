"""Chooses the transport backend by URL scheme; it knows nothing else about the backends."""

from __future__ import annotations

from common.errors import InvalidArgument
from common.transport.base import Endpoint
from common.transport.cuda_device import attached_cuda_device
from common.transport.inproc import InprocNetwork
from common.transport.nccl import NcclEndpoint
from common.transport.ucx import UcxEndpoint
from common.transport.ucx_worker import Progress

_PROCESS_NETWORK = InprocNetwork()


async def open_endpoint(
    url: str, name: str, *, progress: Progress = Progress.EVENT, memory: str = "host", listens: bool = True
) -> Endpoint:
    """Listen at `inproc://host`, `ucx://host:port` or `nccl://host:port` (port 0: any) as the peer `name`, or only be
    ready to connect.

    The endpoint belongs to the running loop. `memory` is where this end's buffers live: `host`, `cuda` (the thread's
    current device) or `cuda:1`. `progress` matters to UCX only. Raises `InvalidArgument`, `Unavailable`, or
    `FailedPrecondition` where there is no GPU, or no NCCL.
    """
    scheme = url.partition("://")[0]
    if scheme == "inproc":
        return _PROCESS_NETWORK.open(url, name, listens)
    if scheme == "ucx":
        return UcxEndpoint(url, name, progress, memory, listens)
    if scheme == "nccl":
        return await NcclEndpoint.open(url, name, attached_cuda_device(memory), listens=listens)
    raise InvalidArgument("url", url, "the scheme is inproc://, ucx:// or nccl://")
