"""Whatever dies, and whenever: the client sees each token exactly once and in order, or one typed error."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import grpc
import pytest
from baton.v1 import decode_pb2, inference_pb2, sampling_pb2, worker_pb2

from common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    PeerLost,
    Preempted,
    RanksLost,
    ResourceExhausted,
    Unavailable,
)
from common.rpc.status import error_from_rpc
from services.router import attempt, moves
from services.router.worker import Worker
from services.router.worker_list import Role
from tests.router.byte_checkpoint import byte_ids
from tests.router.cluster import Cluster, running_cluster
from tests.router.fake_workers import FakeDecode, letters

NUM_TOKENS = 9


def request(num_tokens: int = NUM_TOKENS, **fields: object) -> inference_pb2.GenerateRequest:
    made = inference_pb2.GenerateRequest(text="hello", **fields)  # type: ignore[arg-type]
    made.sampling.max_tokens = num_tokens
    made.sampling.logprobs = 0
    return made


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[Cluster]:
    async with running_cluster(tmp_path, num_prefills=2, num_decodes=2) as running:
        yield running


async def assert_exact(cluster: Cluster, num_migrations: int, num_tokens: int = NUM_TOKENS) -> None:
    """One request, and everything that must hold of it whatever happened."""
    outputs = await cluster.generate(request(num_tokens))
    assert outputs[0].token_ids == letters(0, num_tokens)
    assert outputs[0].logprob_ids == letters(0, num_tokens)
    assert outputs[0].text == "abcdefghijklmnopqrstuvwxyz"[:num_tokens]
    last = outputs[0].last
    assert last is not None
    assert last.finish_reason == sampling_pb2.FINISH_REASON_LENGTH
    assert last.lifetime.num_migrations == num_migrations
    assert last.usage.num_output_tokens == num_tokens
    await cluster.wait_all_closed()
    assert cluster.router.admission.queue.num_in_flight == 0


async def generate_error(cluster: Cluster, num_tokens: int = NUM_TOKENS) -> BatonError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cluster.generate(request(num_tokens))
    await cluster.wait_all_closed()
    return error_from_rpc(caught.value)


@pytest.mark.parametrize("position", range(1, NUM_TOKENS))
@pytest.mark.parametrize("tokens_per_batch", [1, 3])
async def test_tokens_are_exact_when_decode_dies_at_any_position(
    cluster: Cluster, position: int, tokens_per_batch: int
) -> None:
    cluster.script.tokens_per_batch = tokens_per_batch
    cluster.script.at_position[position] = FakeDecode.die
    await assert_exact(cluster, num_migrations=1 if fires(position, tokens_per_batch) else 0)


@pytest.mark.parametrize("position", range(1, NUM_TOKENS))
@pytest.mark.parametrize("end", [decode_pb2.SEQUENCE_END_PREEMPTED, decode_pb2.SEQUENCE_END_LOST])
async def test_tokens_are_exact_when_a_sequence_must_move(
    cluster: Cluster, position: int, end: decode_pb2.SequenceEnd.ValueType
) -> None:
    cluster.script.at_position[position] = end
    await assert_exact(cluster, num_migrations=1)
    log = [list(sequence.token_ids) for decode in cluster.decodes for sequence in decode.opened]
    # The first token comes over prefill's connection: decode's tokens and its end may overtake it, and then all of them
    # are drawn anew.
    known = (0, position)
    assert sorted(log, key=len) in [[byte_ids("hello"), byte_ids("hello") + letters(0, count)] for count in known]


def fires(position: int, tokens_per_batch: int) -> bool:
    """Whether a fake that works in batches gets to this position before it is done."""
    return any(start >= position for start in range(1, NUM_TOKENS, tokens_per_batch))


async def test_a_moved_sequence_gets_a_new_id_and_prefers_another_worker(cluster: Cluster) -> None:
    cluster.script.at_position[4] = decode_pb2.SEQUENCE_END_LOST
    await assert_exact(cluster, num_migrations=1)
    assert [len(decode.opened) for decode in cluster.decodes] == [1, 1]
    ids = {sequence.sequence_id for decode in cluster.decodes for sequence in decode.opened}
    assert len(ids) == 2
    assert all(s.num_prompt_tokens == 5 for decode in cluster.decodes for s in decode.opened)


async def test_preemptions_do_not_count_as_losses(cluster: Cluster) -> None:
    for position in range(1, NUM_TOKENS):
        cluster.script.at_position[position] = decode_pb2.SEQUENCE_END_PREEMPTED
    # Every attempt brings a token from prefill, so no attempt stalls, and every second position is passed.
    outputs = await cluster.generate(request())
    assert outputs[0].token_ids == letters(0, NUM_TOKENS)
    assert outputs[0].last is not None
    assert outputs[0].last.lifetime.num_migrations > 3


async def test_preemptions_during_the_hand_off_are_neither_losses_nor_blamed(cluster: Cluster) -> None:
    num_preemptions = NUM_TOKENS - 2  # each attempt brings one token; more than the losses that are allowed
    cluster.script.prefill_errors_after_token += [Preempted("blocks went to others") for _ in range(num_preemptions)]
    await assert_exact(cluster, num_migrations=num_preemptions)
    assert cluster.num_prefills == num_preemptions + 1
    registry = cluster.router.registry
    assert [len(registry.candidates(role)) for role in (Role.PREFILL, Role.DECODE)] == [2, 2]


async def test_preemptions_end_with_the_deadline(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def now_s() -> float:
        """The deadline passes during the third attempt."""
        return time.monotonic() + (60.0 if cluster.num_prefills >= 3 else 0.0)

    monkeypatch.setattr(attempt, "time", SimpleNamespace(monotonic=now_s, monotonic_ns=time.monotonic_ns))
    cluster.script.prefill_errors_before_token += [Preempted("blocks went to others") for _ in range(100)]
    assert isinstance(await generate_error(cluster), DeadlineExceeded)
    assert cluster.num_prefills == 3


async def test_losses_are_bounded(cluster: Cluster) -> None:
    cluster.script.prefill_errors_before_token += [RanksLost(f"loss {index}") for index in range(10)]
    error = await generate_error(cluster)
    assert isinstance(error, Unavailable)
    assert cluster.num_prefills == 4
    assert "loss 3" in str(error)


@pytest.mark.parametrize(
    "error", [Unavailable("gone"), PeerLost("decode"), InternalError("bug"), FailedPrecondition("fp")]
)
async def test_a_prefill_that_fails_before_its_token_is_replaced(cluster: Cluster, error: BatonError) -> None:
    cluster.script.prefill_errors_before_token.append(error)
    await assert_exact(cluster, num_migrations=1)
    assert [len(prefill.requests) for prefill in cluster.prefills] == [1, 1]


async def test_a_prefill_that_fails_after_its_token_is_replaced(cluster: Cluster) -> None:
    cluster.script.prefill_errors_after_token.append(PeerLost("decode"))
    await assert_exact(cluster, num_migrations=1)
    sizes = sorted(len(p.sequence.token_ids) for prefill in cluster.prefills for p in prefill.requests)
    assert sizes == [5, 6]


@pytest.mark.parametrize("error", [PeerLost("unreachable"), FailedPrecondition("small slots"), Cancelled("stopping")])
async def test_decode_workers_that_take_no_hand_off_are_avoided_though_idle(tmp_path: Path, error: BatonError) -> None:
    async with running_cluster(tmp_path, num_decodes=3) as cluster:
        good = cluster.decodes[2]
        good.status.num_open = 100
        good.set_state(worker_pb2.WORKER_STATE_READY)
        registry = cluster.router.registry
        await cluster.wait_until(lambda: 100 in [c.load for c in registry.candidates(Role.DECODE)])
        cluster.script.handoff_errors.update({decode.address: error for decode in cluster.decodes[:2]})
        for _ in range(3):
            outputs = await cluster.generate(request())
            assert outputs[0].token_ids == letters(0, NUM_TOKENS)
            last = outputs[0].last
            assert last is not None
            assert last.lifetime.num_migrations <= 2


async def test_a_moving_sequence_waits_for_room(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moves, "LAST_BACKOFF_S", 0.001)
    num_refusals = 12  # more than the losses that are allowed

    async def fill_up(decode: FakeDecode) -> None:
        cluster.script.open_errors += [ResourceExhausted("no place") for _ in range(num_refusals)]

    cluster.script.at_position.update({3: fill_up, 4: decode_pb2.SEQUENCE_END_PREEMPTED})
    outputs = await cluster.generate(request())
    assert outputs[0].token_ids == letters(0, NUM_TOKENS)
    assert not cluster.script.open_errors


async def test_a_moving_sequence_does_not_wait_for_room_for_ever(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, migration_timeout_s=0) as cluster:

        async def fill_up(decode: FakeDecode) -> None:
            cluster.script.open_errors += [ResourceExhausted("no place") for _ in range(100)]

        cluster.script.at_position.update({3: fill_up, 4: decode_pb2.SEQUENCE_END_PREEMPTED})
        assert isinstance(await generate_error(cluster), ResourceExhausted)
        assert cluster.num_opened == 2


async def test_a_prefill_that_dies_after_the_hand_off_does_no_harm(cluster: Cluster) -> None:
    cluster.script.before_completed.clear()
    registry = cluster.router.registry

    async def kill_prefill(decode: FakeDecode) -> None:
        await next(prefill for prefill in cluster.prefills if prefill.requests).die()
        while len(registry.candidates(Role.PREFILL)) > 1:
            await registry.wait_changed()

    cluster.script.at_position[4] = kill_prefill
    await assert_exact(cluster, num_migrations=0)
    assert cluster.num_opened == 1


async def test_a_prefill_that_fails_after_the_token_that_ends_the_output_does_no_harm(cluster: Cluster) -> None:
    cluster.script.prefill_errors_after_token.append(Unavailable("gone"))
    await assert_exact(cluster, num_migrations=0, num_tokens=1)
    assert cluster.num_prefills == 1


async def test_an_open_that_is_refused_goes_elsewhere(cluster: Cluster) -> None:
    cluster.script.open_errors.append(ResourceExhausted("no blocks"))
    await assert_exact(cluster, num_migrations=1)
    assert [len(decode.opened) for decode in cluster.decodes] == [1, 1]


async def test_a_service_that_is_full_everywhere_says_so(cluster: Cluster) -> None:
    cluster.script.open_errors += [ResourceExhausted("no blocks", 3.0) for _ in range(10)]
    cluster.script.before_first_token.clear()  # an output that has its first token would wait for room
    error = await generate_error(cluster)
    assert isinstance(error, ResourceExhausted)
    assert error.retry_after_s == 3.0


async def test_a_sequence_that_failed_alone_is_not_sent_again(cluster: Cluster) -> None:
    cluster.script.at_position[3] = decode_pb2.SEQUENCE_END_FAILED
    error = await generate_error(cluster)
    assert isinstance(error, InternalError)
    assert "it failed" in str(error)
    assert cluster.num_opened == 1


async def test_a_deadline_seen_by_decode_is_the_requests_deadline(cluster: Cluster) -> None:
    cluster.script.at_position[3] = decode_pb2.SEQUENCE_END_DEADLINE
    assert isinstance(await generate_error(cluster), DeadlineExceeded)
    assert cluster.num_opened == 1


async def test_a_broken_token_stream_loses_the_sequence_and_stands_again(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:

        async def break_streams(decode: FakeDecode) -> None:
            decode.break_streams()
            await asyncio.Event().wait()

        cluster.script.at_position[3] = break_streams
        await assert_exact(cluster, num_migrations=1)


async def test_an_only_pair_that_dies_and_comes_back_finishes_the_sequence(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        revived: list[asyncio.Task[None]] = []

        async def revive(decode: FakeDecode) -> None:
            await decode.die()
            await cluster.wait_until_serving(False)
            await decode.start()

        async def die_and_revive(decode: FakeDecode) -> None:
            revived.append(asyncio.get_running_loop().create_task(revive(decode)))
            await asyncio.Event().wait()

        cluster.script.at_position[4] = die_and_revive
        await assert_exact(cluster, num_migrations=1)
        await asyncio.gather(*revived)


async def test_ranks_that_restart_keep_the_sequence_waiting(tmp_path: Path) -> None:
    async with running_cluster(tmp_path) as cluster:
        decode = cluster.decodes[0]

        async def restart_ranks(decode: FakeDecode) -> None:
            decode.set_state(worker_pb2.WORKER_STATE_STARTING)

        cluster.script.at_position[4] = restart_ranks
        cluster.script.at_position[5] = decode_pb2.SEQUENCE_END_LOST
        running = asyncio.ensure_future(assert_exact(cluster, num_migrations=1))
        await cluster.wait_until_serving(False)
        decode.set_state(worker_pb2.WORKER_STATE_READY)
        await running


async def test_output_that_was_complete_when_its_worker_died_is_not_sent_again(cluster: Cluster) -> None:
    stop = byte_ids("e")[0]

    for decode in cluster.decodes:
        original = decode._next_tokens

        def next_tokens(sequence: object, position: int, original: object = original) -> object:
            entry = original(sequence, position)  # type: ignore[operator]
            entry.ClearField("end")
            return entry

        decode._next_tokens = next_tokens  # type: ignore[assignment, method-assign]
    asked = request(50)
    asked.sampling.stop_token_ids.append(stop)
    outputs = await cluster.generate(asked)
    assert outputs[0].token_ids == letters(0, 5)
    assert outputs[0].text == "abcd"
    assert cluster.num_opened == 1
    await cluster.wait_all_closed()


@pytest.mark.parametrize("choices", [2, 5])
async def test_each_of_several_choices_survives_a_death(cluster: Cluster, choices: int) -> None:
    cluster.script.at_position[4] = FakeDecode.die
    outputs = await cluster.generate(request(n=choices))
    assert {index: output.token_ids for index, output in outputs.items()} == {
        choice: letters(choice, NUM_TOKENS) for choice in range(choices)
    }


async def test_without_workers_a_request_is_unavailable_soon(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, placement_timeout_s=0.05, restart_timeout_s=0.05) as cluster:
        await cluster.decodes[0].die()
        await cluster.wait_until_serving(False)
        assert isinstance(await generate_error(cluster), Unavailable)
        assert cluster.num_prefills == 0


async def test_a_long_output_outlives_more_drains_than_losses_are_allowed(cluster: Cluster) -> None:
    num_drains = 6
    registry = cluster.router.registry

    async def drain_and_stop(decode: FakeDecode) -> None:
        decode.set_state(worker_pb2.WORKER_STATE_DRAINING)
        await cluster.wait_until(lambda: len(registry.candidates(Role.DECODE)) < 2)
        decode.break_streams()  # its time to drain is up
        decode.set_state(worker_pb2.WORKER_STATE_READY)
        await asyncio.Event().wait()

    for position in range(1, num_drains + 1):
        cluster.script.at_position[2 * position] = drain_and_stop
    num_tokens = 2 * num_drains + 3
    outputs = await cluster.generate(request(num_tokens))
    assert outputs[0].token_ids == letters(0, num_tokens)
    last = outputs[0].last
    assert last is not None
    assert last.lifetime.num_migrations == num_drains


@pytest.mark.parametrize("says_it_starts", [True, False])
async def test_a_new_request_waits_for_a_start_that_is_under_way(tmp_path: Path, says_it_starts: bool) -> None:
    async with running_cluster(tmp_path, placement_timeout_s=0.0) as cluster:
        prefill = cluster.prefills[0]
        if says_it_starts:
            prefill.set_state(worker_pb2.WORKER_STATE_STARTING)
        else:
            await prefill.die()
        await cluster.wait_until_serving(False)
        running = asyncio.ensure_future(assert_exact(cluster, num_migrations=0))
        for _ in range(1000):  # until it is there, and has found nobody
            await asyncio.sleep(0)
        if says_it_starts:
            prefill.set_state(worker_pb2.WORKER_STATE_READY)
        else:
            await prefill.start()
        await running


async def test_a_decode_worker_that_refuses_hand_offs_is_asked_seldom(tmp_path: Path) -> None:
    async with running_cluster(tmp_path, num_decodes=2) as cluster:
        good, bad = cluster.decodes
        good.status.num_open = 100
        good.set_state(worker_pb2.WORKER_STATE_READY)
        registry = cluster.router.registry
        await cluster.wait_until(lambda: 100 in [c.load for c in registry.candidates(Role.DECODE)])
        cluster.script.handoff_errors[bad.address] = PeerLost("unreachable")
        num_moves = 0
        for _ in range(20):
            outputs = await cluster.generate(request())
            assert outputs[0].token_ids == letters(0, NUM_TOKENS)
            last = outputs[0].last
            assert last is not None
            num_moves += last.lifetime.num_migrations
        assert 1 <= num_moves <= 3, "each one is tried there first"


async def test_two_that_cannot_reach_each_other_stay_candidates(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    suspected: list[str] = []
    monkeypatch.setattr(Worker, "suspect", lambda self: suspected.append(self.address))
    cluster.script.prefill_errors_after_token.append(PeerLost("decode"))
    await assert_exact(cluster, num_migrations=1)
    assert not suspected
    cluster.script.prefill_errors_before_token.append(RanksLost("prefill"))
    await assert_exact(cluster, num_migrations=1)
    assert len(suspected) == 1
