"""Chooses the transport backend by URL scheme; it knows nothing else about the backends."""

from __future__ import annotations

from common.errors import InvalidArgument
from common.transport.base import Endpoint
from common.transport.inproc import InprocNetwork
from common.transport.ucx import UcxEndpoint
from common.transport.ucx_worker import Progress

_PROCESS_NETWORK = InprocNetwork()


async def open_endpoint(url: str, name: str, *, progress: Progress = Progress.EVENT, memory: str = "host") -> Endpoint:
    """Listen at `inproc://host` or `ucx://host:port` (port 0: any) as the peer `name`, on the running loop.

    `progress` and `memory` (`host` or `cuda`) matter to UCX only. Raises `InvalidArgument` or `Unavailable`.
    """
    scheme = url.partition("://")[0]
    if scheme == "inproc":
        return _PROCESS_NETWORK.open(url, name)
    if scheme == "ucx":
        return UcxEndpoint(url, name, progress, memory)
    raise InvalidArgument("url", url, "the scheme is inproc:// or ucx://")
