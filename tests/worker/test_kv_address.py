"""Where ranks listen, and what their peers are told."""

from __future__ import annotations

import pytest

from common.errors import InvalidArgument
from common.worker.kv_address import (
    check_reachable,
    default_transport_url,
    fixed_ports,
    names_every_interface,
    rank_urls,
    reachable_url,
)


@pytest.mark.parametrize(
    ("listen", "url"),
    [
        ("127.0.0.1:50071", "ucx://127.0.0.1:0"),
        ("[::1]:50071", "ucx://127.0.0.1:0"),
        ("0.0.0.0:50071", "ucx://0.0.0.0:0"),
        ("[::]:50071", "ucx://0.0.0.0:0"),
        ("10.0.0.7:1", "ucx://10.0.0.7:0"),
        ("decode-0.pool:1", "ucx://decode-0.pool:0"),
    ],
)
def test_bytes_arrive_where_calls_do_unless_told_otherwise(listen: str, url: str) -> None:
    assert default_transport_url(listen) == url


def test_an_ipv6_host_has_no_default() -> None:
    with pytest.raises(ValueError, match="fd00::7"):
        default_transport_url("[fd00::7]:1")


def test_ranks_take_one_port_each() -> None:
    assert rank_urls("ucx://h:7000", 3) == ["ucx://h:7000", "ucx://h:7001", "ucx://h:7002"]
    assert fixed_ports("ucx://h:7000", 3) == ("h", [7000, 7001, 7002])
    assert rank_urls("nccl://h:0", 2) == ["nccl://h:0"] * 2
    assert fixed_ports("nccl://h:0", 2) == ("h", [])
    assert rank_urls("ucx://h:65535", 1) == ["ucx://h:65535"]


@pytest.mark.parametrize(("url", "tp_size"), [("ucx://h:65535", 2), ("ucx://h:65530", 7), ("ucx://h:x", 1)])
def test_ports_that_do_not_exist_are_refused(url: str, tp_size: int) -> None:
    with pytest.raises(InvalidArgument, match="transport_url"):
        rank_urls(url, tp_size)


def test_a_rank_on_every_interface_is_told_at_the_host_of_the_hand_off() -> None:
    assert reachable_url("ucx://0.0.0.0:7", "10.0.0.7:50071") == "ucx://10.0.0.7:7"
    assert reachable_url("ucx://10.1.0.7:7", "10.0.0.7:50071") == "ucx://10.1.0.7:7"


@pytest.mark.parametrize(("host", "expected"), [("0.0.0.0", True), ("::", True), ("127.0.0.1", False), ("h", False)])
def test_hosts_that_nobody_can_connect_to_from_elsewhere(host: str, expected: bool) -> None:
    assert names_every_interface(host) is expected


@pytest.mark.parametrize(("listen", "advertise"), [("0.0.0.0:1", ""), ("[::]:1", ""), ("10.0.0.7:1", "0.0.0.0:1")])
def test_an_address_that_peers_cannot_reach_is_refused(listen: str, advertise: str) -> None:
    with pytest.raises(ValueError, match="names every interface"):
        check_reachable(listen, advertise)
    check_reachable(listen, "10.0.0.7:1")
