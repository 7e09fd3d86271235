"""Which network devices UCX has found, read from UCX's own list, and which ones an endpoint is to use.

UCX finds devices under /sys/class/net. Without it nothing but memory of this process and machine is left, and all that
UCX says of a peer is that the destination is unreachable.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from ucxx._lib.libucxx import UCXContext, get_current_options

from common.errors import FailedPrecondition

_RESOURCE: Final = re.compile(r"resource\s+\d+\s*:.*\s(\w+)/(\S+)$", re.MULTILINE)
_NO_NETWORK: Final = frozenset({"self", "memory"})  # the "devices" of transports within a machine
_LOOPBACK_DEVICE: Final = "lo"


def device_options(address: str) -> dict[str, str]:
    """UCX's options for an endpoint at this IPv4 address: a loopback address keeps all of its sockets off the network.

    UCX opens a listening socket on every device that it may use. What UCX_NET_DEVICES says comes first.
    """
    chosen = get_current_options()["NET_DEVICES"]
    return {"NET_DEVICES": _LOOPBACK_DEVICE} if chosen == "all" and ipaddress.ip_address(address).is_loopback else {}


def network_devices(context: UCXContext) -> list[str]:
    """Names such as `eth0` or `mlx5_0:1`. Raises `FailedPrecondition` if UCX has none."""
    devices = parse_devices(context.info)
    if not devices:
        raise FailedPrecondition(
            "UCX finds no network device: UCX needs /sys to be mounted (it reads /sys/class/net), and UCX_NET_DEVICES, "
            "if set, to name a device that exists"
        )
    return devices


def parse_devices(info: str) -> list[str]:
    """Read what `ucp_context_print_info` prints. GPUs and shared memory are no network devices."""
    found = [name for transport, name in _RESOURCE.findall(info) if not transport.startswith(("cuda", "gdr", "rocm"))]
    return sorted(set(found) - _NO_NETWORK)
