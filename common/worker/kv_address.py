"""Where the ranks of a worker listen for KV bytes, and what is told to their peers. Pure: URLs in, URLs out."""

from __future__ import annotations

import ipaddress
from typing import Final
from urllib.parse import urlsplit

from common.config import split_address
from common.errors import InvalidArgument

_ANY: Final = "0.0.0.0"
_LOOPBACK: Final = "127.0.0.1"
_MAX_PORT: Final = 65535


def names_every_interface(host: str) -> bool:
    """Whether the host can be listened on but not be reached from elsewhere: `0.0.0.0`, `::`."""
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False  # a name


def default_transport_url(listen: str) -> str:
    """UCX beside the gRPC server that listens at `host:port`, which UCX can only do with IPv4. Raises `ValueError`."""
    host, _ = split_address(listen)
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f"ucx://{host}:0"
    if address.is_unspecified:
        return f"ucx://{_ANY}:0"
    if address.is_loopback:
        return f"ucx://{host if address.version == 4 else _LOOPBACK}:0"
    if address.version == 6:
        raise ValueError(f"transport_url must be set: UCX does not take the IPv6 address {host}")
    return f"ucx://{host}:0"


def rank_urls(transport_url: str, tp_size: int) -> list[str]:
    """One URL a rank: rank r has the port + r, or any port if that is 0. Raises `InvalidArgument`."""
    scheme, host, port = _parts(transport_url)
    if port is None or port == 0:
        return [transport_url] * tp_size
    if port + tp_size - 1 > _MAX_PORT:
        limit = f"ranks take the ports from there on, {tp_size} of them"
        raise InvalidArgument("transport_url", transport_url, limit)
    return [f"{scheme}://{host}:{port + rank}" for rank in range(tp_size)]


def fixed_ports(transport_url: str, tp_size: int) -> tuple[str, list[int]]:
    """The host and ports that must be free for the ranks to listen; none if any will do."""
    _, host, port = _parts(transport_url)
    return host, [port + rank for rank in range(tp_size)] if port else []


def reachable_url(address: str, handoff_address: str) -> str:
    """A rank's address for its peers: where it listens on every interface, at the host of `handoff_address`."""
    scheme, host, port = _parts(address)
    if not names_every_interface(host):
        return address
    reachable, _ = split_address(handoff_address)
    return f"{scheme}://{reachable}:{port}"


def check_reachable(listen: str, advertise: str) -> None:
    """Raises `ValueError` unless tickets can name where this worker is."""
    host, _ = split_address(advertise or listen)
    if names_every_interface(host):
        named = f"advertise = {advertise!r}" if advertise else f"listen = {listen!r}"
        raise ValueError(f"{named} names every interface: advertise must name the one that prefill workers reach")


def _parts(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port. Raises `InvalidArgument`."""
    parts = urlsplit(url)
    try:
        return parts.scheme, parts.hostname or "", parts.port
    except ValueError as error:
        raise InvalidArgument("transport_url", url, str(error)) from error
