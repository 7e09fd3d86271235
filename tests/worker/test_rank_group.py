"""A group of rank processes: it answers, and whatever goes wrong it ends typed and leaves no process."""

import asyncio
import json
import os
import signal
from pathlib import Path

import msgspec
import pytest

from common.errors import InternalError, ModelError, Unavailable
from common.sampling.params import SamplingParams
from common.worker.rank_group import MAX_UNREAD_RESULTS, RankGroup, error_of
from common.worker.rank_messages import ConnectDone, ConnectPeer, StartRank
from common.worker.step_plan import AddRow, Segment, StepPlan

MODULE = "tests.worker.fake_rank"


def _specs(behaviour: str, count: int = 2) -> list[StartRank]:
    return [
        StartRank(
            rank=rank,
            tp_size=count,
            group_address="127.0.0.1:1",
            model_dir=behaviour,
            device="cpu",
            dtype="float32",
            num_blocks=1,
            block_size=64,
            max_rows=1,
            max_step_tokens=1,
            num_slots=1,
            slot_bytes=1,
            transport_url="inproc://x",
            transport_progress="event",
            peer_name="peer",
        )
        for rank in range(count)
    ]


def _plan(step_id: int) -> StepPlan:
    return StepPlan(step_id, [Segment(0, None, step_id * 10, [], True, 0)])


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


async def test_plans_are_answered_in_order_by_the_first_rank() -> None:
    group = await RankGroup.start(MODULE, _specs("echo"), 30.0)
    async with group:
        assert [info.transport_address for info in group.infos] == ["fake://0", "fake://1"]
        for step_id in range(3):
            group.submit(_plan(step_id))
        results = [await group.next_result() for _ in range(3)]
    assert group.has_served
    assert [(result.step_id, result.sampled[0].token_id) for result in results] == [(0, 0), (1, 10), (2, 20)]


async def test_every_reply_of_an_operation_arrives_in_order() -> None:
    group = await RankGroup.start(MODULE, _specs("echo"), 30.0)
    async with group:
        operation = group.begin(1, ConnectPeer(group.next_op_id(), "fake://9", b"", 1.0))
        replies = [await operation.reply(), await operation.reply()]
    assert replies == [ConnectDone(operation.op_id, "first"), ConnectDone(operation.op_id, "second")]


async def test_leaving_the_group_ends_its_processes() -> None:
    group = await RankGroup.start(MODULE, _specs("echo"), 30.0)
    pids = group.pids
    async with group:
        assert all(_alive(pid) for pid in pids)
    assert not any(_alive(pid) for pid in pids)


async def test_a_rank_that_does_not_read_is_killed_though_its_channels_are_full() -> None:
    group = await RankGroup.start(MODULE, _specs("echo"), 30.0)
    pids = group.pids
    more_than_sockets_hold = 16 << 20
    try:
        os.kill(pids[0], signal.SIGSTOP)
        group.submit(AddRow(0, SamplingParams(max_tokens=1, seed=0), bytes(more_than_sockets_hold), b""))
        group.begin(0, ConnectPeer(group.next_op_id(), "x" * more_than_sockets_hold, b"", 1.0))
        async with asyncio.timeout(30.0):
            await group.stop(grace_s=0.1)
        assert not any(_alive(pid) for pid in pids)
    finally:
        for pid in filter(_alive, pids):
            os.kill(pid, signal.SIGKILL)


async def test_killed_rank_fails_waits_and_operations_with_its_name() -> None:
    group = await RankGroup.start(MODULE, _specs("echo"), 30.0)
    async with group:
        operation = group.begin(0, ConnectPeer(group.next_op_id(), "fake://9", b"", 1.0))
        await operation.reply()
        await operation.reply()
        os.kill(group.pids[1], signal.SIGKILL)
        assert "rank 1" in await group.wait_lost()
        for _ in range(2):
            with pytest.raises(Unavailable, match="rank 1"):
                await group.next_result()
        with pytest.raises(Unavailable, match="rank 1"):
            await operation.reply()
        with pytest.raises(Unavailable, match="rank 1"):
            group.begin(0, ConnectPeer(group.next_op_id(), "fake://9", b"", 1.0))


async def test_rank_that_fails_a_step_loses_the_group_with_its_reason() -> None:
    group = await RankGroup.start(MODULE, _specs("fail-step", count=1), 30.0)
    async with group:
        group.submit(_plan(0))
        with pytest.raises(Unavailable, match="boom"):
            await group.next_result()
        assert group.lost_reason is not None


async def test_a_rank_that_sends_results_nobody_asked_for_loses_the_group() -> None:
    group = await RankGroup.start(MODULE, _specs("babble", count=1), 30.0)
    async with group:
        group.submit(_plan(0))
        assert "nobody asked for" in await asyncio.wait_for(group.wait_lost(), 20)
        for _ in range(MAX_UNREAD_RESULTS):
            await group.next_result()
        for _ in range(2):
            with pytest.raises(Unavailable, match="nobody asked for"):
                await group.next_result()


async def test_why_a_rank_was_ended_is_said(capfd: pytest.CaptureFixture[str]) -> None:
    group = await RankGroup.start(MODULE, _specs("abort", count=1), 30.0)
    pid = group.pids[0]
    async with group:
        group.submit(_plan(0))
        reason = await asyncio.wait_for(group.wait_lost(), 30.0)
    assert reason == (
        f"rank 0 (process {pid}) was ended by SIGABRT, saying: address.c:1138 Assertion `version == 2' failed "
        "(stray bytes on its KV port can do that: keep strangers away from it)"
    )
    assert "==== backtrace ====" in capfd.readouterr().err, "all that it wrote is passed on"
    assert not group.has_served


@pytest.mark.parametrize(
    ("behaviour", "error", "match"),
    [
        ("refuse", ModelError, "lm_head"),
        ("die", Unavailable, "died while starting: it ended with status 3"),
        ("hang", Unavailable, "ready"),
    ],
)
async def test_group_that_cannot_start_says_why(behaviour: str, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        await RankGroup.start(MODULE, _specs(behaviour, count=1), 1.0 if behaviour == "hang" else 30.0)


async def test_a_rank_that_is_stopped_while_others_start_ends_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.stopped_process.INTERVAL_S", 0.02)
    starting, ready = _specs("hang")
    ready = msgspec.structs.replace(ready, model_dir="stop")
    with pytest.raises(Unavailable, match=r"rank 1 \(process \d+\) was stopped while starting"):
        await RankGroup.start(MODULE, [starting, ready], 20.0)


async def test_whatever_keeps_a_rank_from_starting_is_told(tmp_path: Path) -> None:
    sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "max_position_embeddings": 64}
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], **sizes, **heads}))
    (spec,) = _specs(str(tmp_path), count=1)
    spec = msgspec.structs.replace(spec, random_weights=True, transport_progress="never")
    with pytest.raises(InternalError, match="ValueError: 'never'"):
        await RankGroup.start("services.decode.rank", [spec], 60.0)


def test_error_is_restored_by_name() -> None:
    assert isinstance(error_of("ModelError", "x"), ModelError)
    unknown = error_of("ZeroDivisionError", "division by zero")
    assert isinstance(unknown, InternalError)
    assert "ZeroDivisionError" in str(unknown)
