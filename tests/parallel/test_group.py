"""Collectives between the ranks of one worker, over every way that CPU ranks can exchange tensors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest
import torch

from common.errors import InvalidArgument, Unavailable
from common.parallel.group import TensorParallelGroup
from common.parallel.shared_memory import SLOT_BYTES
from tests.parallel.in_process_group import run_ranks

CPU = torch.device("cpu")


@pytest.fixture(params=["shared memory", "gloo"])
def use_shared_memory(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "shared memory")


def noise(rank: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(rank))


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("num_elements", [15, SLOT_BYTES // 4 + 7])
def test_all_reduce_gives_every_rank_the_same_sum(
    size: int, num_elements: int, tmp_path: Path, use_shared_memory: bool
) -> None:
    def body(group: TensorParallelGroup) -> list[torch.Tensor]:
        return [group.all_reduce(noise(group.rank + 10 * turn, num_elements)) for turn in range(3)]

    sums = run_ranks(size, tmp_path / "store", body, use_shared_memory)
    for turn in range(3):
        parts = [noise(rank + 10 * turn, num_elements) for rank in range(size)]
        torch.testing.assert_close(sums[0][turn], torch.stack(parts).sum(dim=0), atol=1e-5, rtol=1e-5)
        assert all(torch.equal(other[turn], sums[0][turn]) for other in sums)


@pytest.mark.parametrize("num_rows", [2, SLOT_BYTES // 16 + 3])
def test_all_gather_stacks_in_rank_order(num_rows: int, tmp_path: Path, use_shared_memory: bool) -> None:
    def body(group: TensorParallelGroup) -> torch.Tensor:
        return group.all_gather(noise(group.rank, num_rows, 3))

    expected = torch.stack([noise(0, num_rows, 3), noise(1, num_rows, 3)])
    for gathered in run_ranks(2, tmp_path / "store", body, use_shared_memory):
        assert torch.equal(gathered, expected)


def _listening() -> set[str]:
    connections = psutil.Process().net_connections(kind="inet")
    return {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}


def test_ranks_listen_on_loopback_only(unused_tcp_port: int, use_shared_memory: bool) -> None:
    before = _listening()

    def run_rank(rank: int) -> tuple[float, set[str]]:
        address = f"127.0.0.1:{unused_tcp_port}"
        group = TensorParallelGroup.open(rank, 2, address, CPU, 20.0, use_shared_memory)
        total = group.all_reduce(torch.ones(4))[0].item()
        seen = _listening()
        group.all_reduce(torch.ones(1))  # nobody leaves before both have looked
        group.close()
        return total, seen

    with ThreadPoolExecutor(2) as pool:
        for total, seen in pool.map(run_rank, range(2)):
            assert total == 2.0
            assert seen - before <= {"127.0.0.1"}
            assert "127.0.0.1" in seen


def test_many_exchanges_in_a_row_never_mix(tmp_path: Path) -> None:
    def body(group: TensorParallelGroup) -> list[float]:
        return [group.all_reduce(torch.full((4,), float(turn)))[0].item() for turn in range(300)]

    assert run_ranks(3, tmp_path / "store", body) == [[3.0 * turn for turn in range(300)]] * 3


def test_bfloat16_is_summed(tmp_path: Path, use_shared_memory: bool) -> None:
    def body(group: TensorParallelGroup) -> list[float]:
        total: list[float] = group.all_reduce(torch.tensor([1.0, group.rank], dtype=torch.bfloat16)).tolist()
        return total

    assert run_ranks(2, tmp_path / "store", body, use_shared_memory) == [[2.0, 1.0]] * 2


def test_a_rank_that_leaves_fails_the_collective_of_the_others(tmp_path: Path) -> None:
    def body(group: TensorParallelGroup) -> str:
        group.all_reduce(torch.ones(1))
        if group.rank == 1:
            return "left"  # and closes
        with pytest.raises(Unavailable, match="rank 1 left"):
            group.all_reduce(torch.ones(1))
        return "noticed"

    assert run_ranks(2, tmp_path / "store", body) == ["noticed", "left"]


def test_a_group_of_one_changes_nothing() -> None:
    group = TensorParallelGroup.open(0, 1, "ignored", CPU, timeout_s=1.0)
    tensor = torch.arange(3)
    assert group.all_reduce(tensor) is tensor
    assert torch.equal(group.all_gather(tensor), tensor.unsqueeze(0))
    group.close()


def test_ranks_can_meet_at_a_port(unused_tcp_port: int, use_shared_memory: bool) -> None:
    def body(rank: int) -> float:
        address = f"127.0.0.1:{unused_tcp_port}"
        group = TensorParallelGroup.open(rank, 2, address, CPU, 30.0, use_shared_memory)
        total = group.all_reduce(torch.ones(1)).item()
        group.all_reduce(torch.ones(1))
        group.close()
        return total

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(body, range(2))) == [2.0, 2.0]


def test_a_rank_that_does_not_come_is_reported(unused_tcp_port: int) -> None:
    with pytest.raises(Unavailable, match="rank 1 of 2 could not meet"):
        TensorParallelGroup.open(1, 2, f"127.0.0.1:{unused_tcp_port}", CPU, timeout_s=0.3)


@pytest.mark.parametrize("address", ["nowhere", ":", "host:port"])
def test_an_address_without_a_port_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgument, match="group_address"):
        TensorParallelGroup.open(0, 2, address, CPU, timeout_s=1.0)
