"""Collectives between the ranks of one worker."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from common.errors import InvalidArgument, Unavailable
from common.parallel.group import TensorParallelGroup
from tests.parallel.in_process_group import run_ranks

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [2, 4])
def test_all_reduce_gives_every_rank_the_same_sum(size: int, tmp_path: Path) -> None:
    def body(group: TensorParallelGroup) -> torch.Tensor:
        own = torch.randn((3, 5), generator=torch.Generator().manual_seed(group.rank))
        return group.all_reduce(own)

    sums = run_ranks(size, tmp_path / "store", body)
    parts = [torch.randn((3, 5), generator=torch.Generator().manual_seed(rank)) for rank in range(size)]
    torch.testing.assert_close(sums[0], torch.stack(parts).sum(dim=0))
    assert all(torch.equal(other, sums[0]) for other in sums)


def test_all_gather_stacks_in_rank_order(tmp_path: Path) -> None:
    def body(group: TensorParallelGroup) -> list[list[int]]:
        group.barrier()
        gathered: list[list[int]] = group.all_gather(torch.tensor([group.rank, group.rank + 10])).tolist()
        return gathered

    assert run_ranks(2, tmp_path / "store", body) == [[[0, 10], [1, 11]]] * 2


def test_a_group_of_one_changes_nothing() -> None:
    group = TensorParallelGroup.open(0, 1, "ignored", CPU, timeout_s=1.0)
    tensor = torch.arange(3)
    assert group.all_reduce(tensor) is tensor
    assert torch.equal(group.all_gather(tensor), tensor.unsqueeze(0))
    group.close()


def test_ranks_can_meet_at_a_port(unused_tcp_port: int) -> None:
    def body(rank: int) -> float:
        group = TensorParallelGroup.open(rank, 2, f"127.0.0.1:{unused_tcp_port}", CPU, timeout_s=30.0)
        total = group.all_reduce(torch.ones(1)).item()
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
