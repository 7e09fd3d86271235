"""The decode end of the hand-off, with a fault at every step. Each story ends with nothing held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from baton.v1 import kv_pb2
from msgspec.structs import replace

from common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Preempted,
    TransferError,
    TransferTimeout,
    Unavailable,
)
from tests.decode.fake_group import scattered_as
from tests.decode.front import LAYOUT, Front, OpenTicket, Prefill, Router, next_post, running_front, ship
from tests.decode.requests import token_of


async def test_chunks_arrive_the_sequence_joins_and_its_tokens_come() -> None:
    async with running_front(tp_size=2) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(7, num_tokens=10, max_tokens=4))
        accepted = (await prefill.receive("accepted")).accepted
        assert (accepted.num_blocks_reused, accepted.max_layer_blocks_per_chunk > 0) == (0, True)
        await ship(front, prefill, 0, 0, 2)
        await ship(front, prefill, 1, 2, 1)
        prefill.finish(num_blocks=3)
        await prefill.receive("joined")
        await prefill.over()
        assert await router.end_of(7) == "FINISHED"
        assert router.tokens[7] == [token_of(1, index) for index in (1, 2, 3)]
        await front.until_free()
        assert front.group.num_operations == 0
        await router.leave()


async def test_a_hand_off_may_begin_before_its_sequence_is_open() -> None:
    async with running_front() as front:
        router = await Router(front).subscribed()
        prefills = [Prefill(front, OpenTicket(ticket_id)) for ticket_id in (2, 1)]
        await asyncio.sleep(0)
        assert front.worker.status().num_open == 0
        for sequence_id in (1, 2):
            router.open(sequence_id)
        for prefill in prefills:
            await prefill.receive("accepted")
            await prefill.break_off()
        await front.until_free()
        await router.leave()


async def test_a_hand_off_whose_sequence_is_never_opened_is_refused() -> None:
    async with running_front() as front:
        with pytest.raises(NotFound):
            await Prefill(front, OpenTicket(1)).over()
        assert not front.worker.handoffs.num_early


async def test_layers_of_a_block_come_in_chunks_of_their_own_and_after_finish() -> None:
    async with running_front() as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(7, num_tokens=10, max_tokens=4))
        await prefill.receive("accepted")
        prefill.finish(num_blocks=3)
        await ship(front, prefill, 0, 0, 3, range(1, 2))
        await ship(front, prefill, 1, 0, 2, range(1))
        prefill.offer(2, 2, 1, 0, 1)
        await prefill.receive("grant")
        _, post = await next_post(front)
        assert (post.first_layer, post.num_layers, len(post.block_ids)) == (0, 1, 1)
        assert post.num_bytes == LAYOUT.leg_bytes(1, 1, 2)
        front.group.finish(post)
        await prefill.receive("chunk_verified")
        await prefill.receive("joined")
        await prefill.over()
        assert await router.end_of(7) == "FINISHED"
        await front.until_free()
        await router.leave()


async def test_legs_of_a_chunk_lie_side_by_side_in_the_slot_of_their_rank() -> None:
    async with running_front(tp_size=1) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1), tp_size=2)
        await prefill.receive("accepted")
        prefill.offer(0, 0, 2)
        grant = (await prefill.receive("grant")).grant
        posts = [(await next_post(front))[1] for _ in range(2)]
        assert [(post.peer_name, post.first_local_head, post.num_heads) for post in posts] == [
            ("prefill/0", 0, 1),
            ("prefill/1", 1, 1),
        ]
        assert {post.peer_secret for post in posts} == {bytes(16)}
        assert (posts[0].offset, posts[1].offset) == (0, posts[0].num_bytes)
        assert [(leg.tag, leg.num_bytes) for leg in grant.legs] == [(post.tag, post.num_bytes) for post in posts]
        assert posts[0].tag != posts[1].tag
        await router.leave()


@pytest.mark.parametrize("step", ["begin", "post", "grant", "some legs", "verified"])
async def test_a_stream_that_breaks_leaves_nothing_behind(step: str) -> None:
    async with running_front(tp_size=2) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        if step != "begin":
            prefill.offer(0, 0, 2)
            _, post = await next_post(front)
        if step not in ("begin", "post"):
            await prefill.receive("grant")
        if step in ("some legs", "verified"):
            front.group.finish(post)
        if step == "verified":
            front.group.finish((await next_post(front))[1])
            await prefill.receive("chunk_verified")
        await prefill.break_off()
        await front.until_free()
        assert front.group.num_operations == 0
        reused = router.open(2, num_tokens=10).num_blocks_reused
        assert reused == 0, "other tokens"
        await router.leave()


async def test_what_was_verified_before_the_break_need_not_be_sent_again() -> None:
    async with running_front() as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        await ship(front, prefill, 0, 0, 2)
        prefill.offer(1, 2, 1, num_final_blocks=2)
        await prefill.receive("grant")
        await next_post(front)
        await prefill.break_off()
        again = router.open(1)
        assert again.num_blocks_reused == 2
        prefill = Prefill(front, again)
        assert (await prefill.receive("accepted")).accepted.num_blocks_reused == 2
        await ship(front, prefill, 0, 2, 1)
        prefill.finish(3)
        await prefill.receive("joined")
        assert await router.end_of(1) == "FINISHED"
        await front.until_free()
        await router.leave()


@pytest.mark.parametrize(
    ("error_kind", "outcome", "reason"),
    [
        ("DigestMismatch", "drained", kv_pb2.CHUNK_REJECT_REASON_DIGEST_MISMATCH),
        ("Truncated", "drained", kv_pb2.CHUNK_REJECT_REASON_TRUNCATED),
        ("PeerLost", "peer_lost", kv_pb2.CHUNK_REJECT_REASON_PEER_LOST),
    ],
)
async def test_a_chunk_that_failed_is_rejected_and_taken_when_it_comes_again(
    error_kind: str, outcome: str, reason: kv_pb2.ChunkRejectReason.ValueType
) -> None:
    async with running_front() as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        front.group.cancel_outcome = outcome
        prefill.offer(0, 0, 3)
        first = (await prefill.receive("grant")).grant
        _, post = await next_post(front)
        front.group.finish(post, error_kind, "for the log")
        rejected = (await prefill.receive("chunk_rejected")).chunk_rejected
        assert (rejected.chunk_index, rejected.reason) == (0, reason)
        prefill.offer(0, 0, 3)
        second = (await prefill.receive("grant")).grant
        assert second.legs[0].tag != first.legs[0].tag
        front.group.finish((await next_post(front))[1])
        await prefill.receive("chunk_verified")
        name = kv_pb2.ChunkRejectReason.Name(reason).removeprefix("CHUNK_REJECT_REASON_").lower()
        assert front.worker.counters.snapshot()[f"chunks_rejected_{name}"] == 1
        assert front.worker.counters.snapshot()[f"cancelled_legs_{outcome}"] == 1
        await prefill.break_off()
        await front.until_free()
        await router.leave()


@pytest.mark.parametrize("field", ["first_local_head", "num_heads", "first_layer", "block_ids", "all"])
async def test_a_chunk_of_which_a_rank_wrote_something_else_is_rejected(field: str) -> None:
    async with running_front(tp_size=1) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1), tp_size=2)
        await prefill.receive("accepted")
        prefill.offer(0, 0, 3)
        await prefill.receive("grant")
        posts = [(await next_post(front))[1] for _ in range(2)]
        front.group.finish(posts[0])
        wrong = scattered_as(posts[1])
        if field == "all":  # the first leg's heads again
            wrong = scattered_as(posts[0])
        elif field == "block_ids":
            wrong = replace(wrong, block_ids=wrong.block_ids[::-1])
        else:
            wrong = replace(wrong, **{field: getattr(wrong, field) + 1})
        front.group.finish(posts[1], scattered=wrong)
        rejected = (await prefill.receive("chunk_rejected")).chunk_rejected
        assert "wrote" in rejected.detail
        await prefill.break_off()
        await front.until_free()
        await router.leave()


async def test_a_stream_that_does_not_begin_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.decode.handoff.BEGIN_TIMEOUT_S", 0.01)

    unread: asyncio.Queue[kv_pb2.HandoffResponse] = asyncio.Queue()

    async def silent() -> AsyncIterator[kv_pb2.HandoffRequest]:
        await asyncio.get_running_loop().create_future()
        yield kv_pb2.HandoffRequest()

    async with running_front() as front:
        with pytest.raises(TransferTimeout, match="did not begin"):
            await asyncio.wait_for(front.worker.hand_off(silent(), unread.put), 5.0)


async def test_a_peer_that_does_not_read_loses_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.decode.handoff_stream.WRITE_TIMEOUT_S", 0.01)
    async with running_front() as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1), num_unread=1)
        prefill.offer(0, 0, 3)
        with pytest.raises(TransferTimeout, match="took no message"):
            await prefill.over()
        await front.until_free()
        await router.leave()


async def test_a_peer_that_leaves_many_answers_unread_loses_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.decode.handoff_stream.MAX_UNSENT", 3)
    async with running_front(max_chunk_resends=100) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1), num_unread=1)
        await prefill.receive("accepted")
        (stream,) = front.worker.handoffs._streams.values()
        for _ in range(5):
            stream.send(kv_pb2.HandoffResponse(grant=kv_pb2.ChunkGrant()))
        reading = asyncio.create_task(_read_on(prefill))
        with pytest.raises(TransferTimeout, match="leaves 2 answers unread"):
            await reading
        await front.until_free()
        await router.leave()


async def _read_on(prefill: Prefill) -> None:
    while True:
        await prefill.receive("grant")


async def test_a_rank_that_does_not_say_whether_its_peer_came_costs_the_chunk_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.decode.chunk_transfer.ANSWER_GRACE_S", 0.0)
    async with running_front(connect_timeout_s=0.01) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        front.group.holds_posts = True
        prefill.offer(0, 0, 3)
        rejected = (await prefill.receive("chunk_rejected")).chunk_rejected
        assert rejected.reason == kv_pb2.CHUNK_REJECT_REASON_PEER_LOST
        front.group.holds_posts = False
        await prefill.break_off()
        await front.until_free()
        await router.leave()


async def test_ranks_that_do_not_take_a_receive_back_are_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but their end says that they do not write to its blocks."""
    monkeypatch.setattr("services.decode.chunk_transfer._HANG_TIMEOUT_S", 0.0)
    async with running_front(grant_timeout_s=0.01, cancel_timeout_s=0.01) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        front.group.hold_cancels = True
        prefill.offer(0, 0, 3)
        await front.until(lambda: front.group.lost_reason is not None)
        assert front.group.lost_reason == "rank 0 does not take back a receive"
        await prefill.break_off()
        await router.leave()


async def test_a_grant_that_is_not_used_in_time_is_taken_back() -> None:
    async with running_front(grant_timeout_s=0.02) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        prefill.offer(0, 0, 3)
        await prefill.receive("grant")
        rejected = (await prefill.receive("chunk_rejected")).chunk_rejected
        assert rejected.reason == kv_pb2.CHUNK_REJECT_REASON_TIMEOUT
        assert front.group.num_cancels == 1
        await prefill.break_off()
        await front.until_free()
        await router.leave()


async def test_a_chunk_that_the_sender_gives_back_may_be_offered_again() -> None:
    async with running_front() as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        prefill.offer(0, 0, 3)
        await prefill.receive("grant")
        await next_post(front)
        prefill.send(chunk_aborted=kv_pb2.ChunkAborted(chunk_index=0, reason="no slot"))
        assert (await prefill.receive("chunk_rejected")).chunk_rejected.detail == "no slot"
        await ship(front, prefill, 0, 0, 3)
        await prefill.break_off()
        await front.until_free()
        await router.leave()


async def test_an_abort_that_comes_while_a_chunk_is_taken_back_hastens_no_verdict() -> None:
    """Until every rank has said what became of its leg, nobody knows what prefill must do about it."""
    async with running_front() as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        front.group.cancel_outcome, front.group.hold_cancels = "peer_lost", True
        prefill.offer(0, 0, 3)
        await prefill.receive("grant")
        _, post = await next_post(front)
        front.group.finish(post, "TransferTimeout", "for the log")
        await _turns()
        assert front.group.num_cancels == 1
        prefill.send(chunk_aborted=kv_pb2.ChunkAborted(chunk_index=0, reason="not sent in time"))
        await _turns()
        assert front.worker.counters.snapshot()["chunks_aborted"] == 1
        assert front.worker.status().num_blocks_held == 3
        assert not sum(n for name, n in front.worker.counters.snapshot().items() if name.startswith("chunks_rejected"))
        front.group.answer_cancels()
        rejected = (await prefill.receive("chunk_rejected")).chunk_rejected
        assert rejected.reason == kv_pb2.CHUNK_REJECT_REASON_PEER_LOST
        await prefill.break_off()
        await front.until_free()
        await router.leave()


async def test_a_slot_in_doubt_is_quarantined_until_its_connection_has_drained() -> None:
    async with running_front(num_slots=1) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        prefill.offer(0, 0, 3)
        await prefill.receive("grant")
        _, post = await next_post(front)
        front.group.cancel_outcome = "in_doubt"
        await prefill.break_off()
        await front.until(lambda: front.worker.status().num_slots_quarantined == 1)
        assert front.worker.status().num_blocks_held == 0, "blocks are free at once"
        other = Prefill(front, router.open(2))
        await other.receive("accepted")
        other.offer(0, 0, 3)
        await front.until(lambda: front.worker.status().num_grants_waiting == 1)
        front.group.cancel_outcome = "drained"
        front.group.drain(post)
        await other.receive("grant")
        assert front.worker.status().num_slots_quarantined == 0
        await other.break_off()
        await front.until_free()
        assert front.group.num_operations == 0
        await router.leave()


async def test_blocks_are_held_until_every_rank_has_answered_the_cancel() -> None:
    async with running_front(tp_size=2) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        prefill.offer(0, 0, 3)
        await prefill.receive("grant")
        front.group.hold_cancels = True
        prefill.send(chunk_aborted=kv_pb2.ChunkAborted(chunk_index=0))
        await prefill.break_off()  # a second reason to cancel, while the first cancel is under way
        await front.until(lambda: front.worker.scheduler.num_open == 0)
        assert front.worker.status().num_blocks_held == 3
        front.group.answer_cancels()
        await front.until_free()
        await router.leave()


async def test_nobody_is_told_of_receives_unless_all_ranks_posted_theirs() -> None:
    async with running_front(tp_size=2) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        front.group.refuse_posts[1] = ("TransferTimeout", "prefill/0 did not connect")
        prefill.offer(0, 0, 3)
        rejected = (await prefill.receive("chunk_rejected")).chunk_rejected
        assert rejected.reason == kv_pb2.CHUNK_REJECT_REASON_PEER_LOST
        assert front.worker.counters.snapshot()["cancelled_legs_not_advertised"] == 1
        await prefill.break_off()
        await front.until_free()
        await router.leave()


async def test_chunks_wait_for_a_slot_in_order() -> None:
    async with running_front(num_slots=1) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        for index in range(3):
            prefill.offer(index, index, 1)
        for index in range(3):
            assert (await prefill.receive("grant")).grant.chunk_index == index
            front.group.finish((await next_post(front))[1])
            assert (await prefill.receive("chunk_verified")).chunk_verified.chunk_index == index
        prefill.finish(3)
        await prefill.receive("joined")
        assert await router.end_of(1) == "FINISHED"
        await front.until_free()
        await router.leave()


async def test_a_deadline_ends_the_sequence_in_the_middle_of_a_transfer() -> None:
    async with running_front() as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1, timeout_s=1.0))
        await prefill.receive("accepted")
        prefill.offer(0, 0, 3)
        await prefill.receive("grant")
        with pytest.raises(DeadlineExceeded):
            await prefill.over()
        assert await router.end_of(1) == "DEADLINE"
        await front.until_free()
        await router.leave()


async def test_lost_ranks_end_everything_and_new_ones_start_clean() -> None:
    async with running_front() as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        prefill.offer(0, 0, 3)
        await prefill.receive("grant")
        front.group.lose("rank 0 died")
        front.worker.on_lost("rank 0 died")
        with pytest.raises(Unavailable):
            await prefill.over()
        assert await router.end_of(1) == "LOST"
        await front.until_free()
        with pytest.raises(Unavailable, match="starting"):
            router.open(2)
        front.group = type(front.group)()
        front.worker.on_ready(front.group)
        prefill = Prefill(front, router.open(3))
        await prefill.receive("accepted")
        await ship(front, prefill, 0, 0, 3)
        prefill.finish(3)
        await prefill.receive("joined")
        assert await router.end_of(3) == "FINISHED"
        await front.until_free()
        await router.leave()


async def test_a_broken_session_ends_its_hand_offs_and_nobody_elses() -> None:
    async with running_front() as front:
        routers = [await Router(front, name).subscribed() for name in ("a", "b")]
        prefills = [Prefill(front, router.open(1, seed=seed)) for seed, router in enumerate(routers)]
        for prefill in prefills:
            await prefill.receive("accepted")
        await ship(front, prefills[0], 0, 0, 2)
        await routers[0].leave()
        with pytest.raises(Cancelled):
            await prefills[0].over()
        await ship(front, prefills[1], 0, 0, 3)
        prefills[1].finish(3)
        await prefills[1].receive("joined")
        assert await routers[1].end_of(1) == "FINISHED"
        assert (routers[0].tokens, routers[0].ends) == ({}, {})
        await front.until_free()
        await routers[1].leave()


@pytest.mark.parametrize(
    ("mistake", "error"),
    [
        ("fingerprint", FailedPrecondition),
        ("ticket", NotFound),
        ("second stream", FailedPrecondition),
        ("uneven heads", InvalidArgument),
        ("many ranks", InvalidArgument),
        ("no secret", InvalidArgument),
        ("short secret", InvalidArgument),
    ],
)
async def test_workers_that_do_not_fit_are_refused_at_begin(mistake: str, error: type[BatonError]) -> None:
    async with running_front() as front:
        router = await Router(front).subscribed()
        ticket = router.open(1)
        first = Prefill(front, ticket)
        await first.receive("accepted")
        if mistake == "fingerprint":
            other = Prefill(front, ticket, fingerprint="another layout")
        elif mistake == "ticket":
            other = Prefill(front, OpenTicket(ticket.ticket_id + 100))
        elif mistake == "uneven heads":
            await first.break_off()
            other = Prefill(front, router.open(2), tp_size=3)
        elif mistake == "many ranks":
            await first.break_off()
            other = Prefill(front, router.open(2), tp_size=100_000)  # each takes its time, and the loop's
        elif mistake.endswith("secret"):
            other = Prefill(front, router.open(2), secrets=[bytes(15)] if mistake.startswith("short") else [])
        else:
            other = Prefill(front, ticket)
        with pytest.raises(error):
            await other.over()
        await first.break_off()
        front.worker.close("router", 2)
        await front.until_free()
        await router.leave()


@pytest.mark.parametrize(
    "mistake",
    [
        "again",
        "beyond",
        "too many",
        "empty",
        "no layer",
        "beyond the layers",
        "layer again",
        "final beyond",
        "unfinished",
        "finished twice",
        "token",
        "silence",
    ],
)
async def test_a_peer_that_breaks_the_protocol_loses_its_stream_only(mistake: str) -> None:
    async with running_front() as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        await ship(front, prefill, 0, 0, 2)
        if mistake == "again":
            prefill.offer(1, 1, 2)  # block 1 is in place, and may be shared
        elif mistake == "beyond":
            prefill.offer(1, 2, 2)
        elif mistake == "too many":
            prefill.offer(1, 2, 1 << 20)
        elif mistake == "empty":
            prefill.offer(1, 2, 0)
        elif mistake == "unfinished":
            prefill.finish(3)
            prefill.half_close()
        elif mistake == "finished twice":
            prefill.finish(3)
            prefill.finish(3)
        elif mistake == "no layer":
            prefill.offer(1, 2, 1, 0, 0)
        elif mistake == "beyond the layers":
            prefill.offer(1, 2, 1, 1, 2)
        elif mistake == "layer again":
            await ship(front, prefill, 1, 2, 1, range(1))
            prefill.offer(2, 2, 1)
        elif mistake == "final beyond":
            prefill.offer(1, 2, 1, num_final_blocks=4)
        elif mistake == "token":
            await ship(front, prefill, 1, 2, 1)
            prefill.finish(3, first_token_id=1 << 20)
        else:
            prefill.half_close()
        with pytest.raises((FailedPrecondition, InvalidArgument, Cancelled)):
            await prefill.over()
        await front.until_free()
        await router.leave()


async def test_a_second_hand_off_of_a_joined_sequence_is_refused_and_changes_nothing() -> None:
    async with running_front() as front:
        front.group.hangs = True
        router = await Router(front).subscribed()
        ticket = router.open(1)
        prefill = Prefill(front, ticket)
        await prefill.receive("accepted")
        await ship(front, prefill, 0, 0, 3)
        prefill.finish(3)
        await prefill.receive("joined")
        await prefill.over()
        with pytest.raises(FailedPrecondition, match="already"):
            await Prefill(front, ticket).over()
        assert front.worker.scheduler.num_open == 1
        await router.leave()
        await front.until(lambda: front.worker.scheduler.num_open == 0)


async def test_a_chunk_that_always_fails_is_given_up() -> None:
    async with running_front(max_chunk_resends=2) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        for _ in range(3):
            await _fail(front, prefill, 0, 0, 3)
        prefill.offer(1, 1, 1)  # under another number, and only a part of it
        with pytest.raises(TransferError, match="rejected 3 times"):
            await prefill.over()
        await front.until_free()
        await router.leave()


async def test_failures_are_counted_for_each_chunk_by_itself() -> None:
    async with running_front(max_chunk_resends=2) as front:
        router = await Router(front).subscribed()
        prefill = Prefill(front, router.open(1))
        await prefill.receive("accepted")
        for index in range(3):
            for _ in range(2):
                await _fail(front, prefill, index, index, 1)
            await ship(front, prefill, index, index, 1)
        prefill.finish(3)
        await prefill.receive("joined")
        assert await router.end_of(1) == "FINISHED"
        await front.until_free()
        await router.leave()


async def test_a_hand_off_whose_blocks_go_to_others_ends_as_preempted() -> None:
    async with running_front(num_blocks=7) as front:
        router = await Router(front).subscribed()
        older = Prefill(front, router.open(1, max_tokens=14))
        await older.receive("accepted")
        await ship(front, older, 0, 0, 3)
        younger = Prefill(front, router.open(2))
        await younger.receive("accepted")
        younger.offer(0, 0, 2)
        await younger.receive("grant")
        older.finish(3)
        await older.receive("joined")
        with pytest.raises(Preempted):
            await younger.over()
        assert await router.end_of(2) == "PREEMPTED"
        assert await router.end_of(1) == "FINISHED"
        assert len(router.tokens[1]) == 13
        await front.until_free()
        await router.leave()


async def _turns() -> None:
    """Let everything run that can: nothing here waits for another process."""
    for _ in range(20):
        await asyncio.sleep(0)


async def _fail(front: Front, prefill: Prefill, index: int, first_block: int, num_blocks: int) -> None:
    """Offer one chunk and let it arrive damaged."""
    prefill.offer(index, first_block, num_blocks)
    await prefill.receive("grant")
    front.group.finish((await next_post(front))[1], "DigestMismatch")
    await prefill.receive("chunk_rejected")
