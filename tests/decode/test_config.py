"""Settings that cannot work are refused at the start."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.config import load_config
from common.errors import FailedPrecondition, InvalidArgument
from common.worker.rank_group import RankGroup
from common.worker.rank_messages import StartRank
from services.decode.config import DecodeConfig
from services.decode.worker import DecodeWorker
from tests.decode.fake_group import FakeGroup
from tests.decode.front import make_model


def load(*flags: str) -> DecodeConfig:
    return load_config(DecodeConfig, ["--model", "somewhere", *flags], {})


def test_nothing_listens_beyond_this_machine_by_default() -> None:
    assert load().listen == "127.0.0.1:50071"
    assert load().kv_url == "ucx://127.0.0.1:0"


@pytest.mark.parametrize("flags", [("--listen", "0.0.0.0:1"), ("--listen", "[::]:1"), ("--advertise", "0.0.0.0:1")])
def test_a_worker_must_say_where_prefill_workers_reach_it(flags: tuple[str, str]) -> None:
    with pytest.raises(InvalidArgument, match="names every interface"):
        load(*flags)


def test_every_interface_is_fine_with_an_address_to_tell() -> None:
    config = load("--listen", "0.0.0.0:1", "--advertise", "10.0.0.7:1")
    assert config.kv_url == "ucx://0.0.0.0:0"


def test_ranks_need_a_port_each() -> None:
    with pytest.raises(InvalidArgument, match="transport_url"):
        load("--transport-url", "ucx://127.0.0.1:65535", "--tp-size", "2")


async def test_ranks_listen_on_ports_of_their_own_which_must_be_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        urls: list[list[str]] = []

        async def start_ranks(_: str, specs: Sequence[StartRank], __: float) -> RankGroup:
            urls.append([spec.transport_url for spec in specs])
            return FakeGroup(2)

        values = {"model": Path("unused"), "tp_size": 2, "transport_url": f"ucx://127.0.0.1:{port - 1}"}
        worker = DecodeWorker(DecodeConfig.model_validate(values), make_model(), lambda: None, start_ranks)
        with pytest.raises(FailedPrecondition, match=str(port)):
            await worker.start_group()
        taken.close()
        await worker.start_group()
        assert urls == [[f"ucx://127.0.0.1:{port - 1}", f"ucx://127.0.0.1:{port}"]]
