"""What every transport backend must do; see `common.transport.base`."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
import torch

from common.errors import Cancelled, FailedPrecondition, PeerLost, TransferError, TransferTimeout, Truncated
from common.transport.base import CancelOutcome, Connection
from common.transport.pair_secret import NO_SECRET
from tests.transport.conftest import OpenPeer, join
from tests.transport.memory import Memory, same
from tests.transport.traffic import MIB, until, until_arriving, untouched

SECRET = bytes(range(16))
Pair = tuple[Connection, Connection]


@pytest.mark.parametrize("num_bytes", [1, 64 << 10, 8 * MIB, 33 * MIB])
async def test_every_byte_arrives(pair: Pair, num_bytes: int, memory: Memory) -> None:
    sender, receiver = pair
    sent, buffer = memory.pattern(num_bytes, seed=1), memory.canary(num_bytes)
    receive = receiver.post_receive(7, buffer)
    await asyncio.gather(sender.send(7, sent), receive.wait())
    assert same(sent, buffer)


@pytest.mark.parametrize("order", [list, lambda tags: list(reversed(tags))], ids=["same", "reversed"])
async def test_messages_find_their_receives_in_any_posting_order(
    pair: Pair, order: Callable[[range], list[int]], memory: Memory
) -> None:
    sender, receiver = pair
    tags = range(64)
    sizes = [1 + tag * 997 for tag in tags]
    buffers = {tag: memory.canary(sizes[tag]) for tag in tags}
    receives = [receiver.post_receive(tag, buffers[tag]) for tag in order(tags)]
    await asyncio.gather(*(sender.send(tag, memory.pattern(sizes[tag], tag)) for tag in tags))
    await asyncio.gather(*(receive.wait() for receive in receives))
    assert all(same(buffers[tag], memory.pattern(sizes[tag], tag)) for tag in tags)


async def test_both_ends_may_send(pair: Pair, memory: Memory) -> None:
    buffers = [memory.canary(100_000, accepting) for accepting in (False, True)]
    receives = [end.post_receive(5, buffer) for end, buffer in zip(pair, buffers, strict=True)]
    await asyncio.gather(*(end.send(5, memory.pattern(100_000, i, i == 1)) for i, end in enumerate(pair)))
    await asyncio.gather(*(receive.wait() for receive in receives))
    assert same(buffers[1], memory.pattern(100_000, 0))
    assert same(buffers[0], memory.pattern(100_000, 1))


async def test_the_extreme_tags_are_tags(pair: Pair, memory: Memory) -> None:
    sender, receiver = pair
    for tag in (0, (1 << 64) - 1):
        receive = receiver.post_receive(tag, memory.canary(10))
        await asyncio.gather(sender.send(tag, memory.pattern(10, 0)), receive.wait())


async def test_a_cancelled_receive_is_drained_at_once_and_its_message_is_stale(
    pair: Pair, open_peer: OpenPeer, memory: Memory
) -> None:
    late, receiver = await open_peer("late"), await open_peer("r")
    sender, accepted = await join(late, receiver, "late")
    for num_bytes in (100, memory.big_bytes):
        buffer = memory.canary(num_bytes)
        receive = accepted.post_receive(1, buffer)
        assert await receive.cancel(0.0) is CancelOutcome.DRAINED
        await sender.send(1, memory.pattern(num_bytes, 0))
        assert untouched(buffer)
        with pytest.raises(Cancelled):
            await receive.wait()
    assert receiver.stats().stale_messages == 2


async def test_cancel_during_arrival_waits_until_the_buffer_is_drained(pair: Pair, memory: Memory) -> None:
    sender, receiver = pair
    buffer = memory.canary(memory.big_bytes)
    receive = receiver.post_receive(1, buffer)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sender.send(1, memory.pattern(memory.big_bytes, 0)))
        await until_arriving(receive)
        assert await receive.cancel(20.0) is CancelOutcome.DRAINED
        buffer.copy_(memory.canary(memory.big_bytes))
    assert untouched(buffer)
    with pytest.raises(Cancelled):
        await receive.wait()


async def test_cancel_without_time_to_drain_is_in_doubt_until_it_has_drained(pair: Pair, memory: Memory) -> None:
    sender, receiver = pair
    receive = receiver.post_receive(1, memory.canary(memory.big_bytes))
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(sender.send(1, memory.pattern(memory.big_bytes, 0)))
        await until_arriving(receive)
        assert await receive.cancel(0.0) is CancelOutcome.IN_DOUBT
        with pytest.raises(Cancelled):
            await receive.wait()
    assert await receive.cancel(20.0) is CancelOutcome.DRAINED


async def test_in_doubt_is_settled_by_closing_the_connection(pair: Pair, memory: Memory) -> None:
    sender, receiver = pair
    buffer = memory.canary(memory.big_bytes)
    receive = receiver.post_receive(1, buffer)
    sending = asyncio.create_task(sender.send(1, memory.pattern(memory.big_bytes, 0)))
    await until_arriving(receive)
    assert await receive.cancel(0.0) is CancelOutcome.IN_DOUBT
    await receiver.close()
    await receiver.drained()
    assert await receive.cancel(0.0) is CancelOutcome.PEER_LOST
    buffer.copy_(memory.canary(memory.big_bytes))
    with pytest.raises(PeerLost):
        await sending
    assert untouched(buffer)


async def test_cancel_after_completion_is_drained_and_changes_nothing(pair: Pair, memory: Memory) -> None:
    sender, receiver = pair
    buffer = memory.canary(1000)
    receive = receiver.post_receive(1, buffer)
    await asyncio.gather(sender.send(1, memory.pattern(1000, 3)), receive.wait())
    assert await receive.cancel(0.0) is CancelOutcome.DRAINED
    await receive.wait()
    assert same(buffer, memory.pattern(1000, 3))


async def test_cancel_again_gives_the_same_answer(pair: Pair, memory: Memory) -> None:
    receive = pair[1].post_receive(1, memory.canary(10))
    assert [await receive.cancel(0.0) for _ in range(3)] == [CancelOutcome.DRAINED] * 3


async def test_a_cancelled_waiter_leaves_the_receive_posted(pair: Pair, memory: Memory) -> None:
    sender, receiver = pair
    receive = receiver.post_receive(1, memory.canary(10))
    waiter = asyncio.create_task(receive.wait())
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.gather(waiter, return_exceptions=True)
    await asyncio.gather(sender.send(1, memory.pattern(10, 0)), receive.wait())


async def test_a_cancelled_sender_does_not_recall_its_message(pair: Pair, memory: Memory) -> None:
    sender, receiver = pair
    buffer = memory.canary(memory.big_bytes)
    receive = receiver.post_receive(1, buffer)
    sending = asyncio.create_task(sender.send(1, memory.pattern(memory.big_bytes, 4)))
    await until_arriving(receive)
    sending.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    await receive.wait()
    assert same(buffer, memory.pattern(memory.big_bytes, 4))


@pytest.mark.parametrize("closing", ["sender", "receiver"])
async def test_close_during_a_transfer_ends_both_sides_with_peer_lost(pair: Pair, closing: str, memory: Memory) -> None:
    sender, receiver = pair
    buffer = memory.canary(memory.big_bytes)
    arriving, unmatched = receiver.post_receive(1, buffer), receiver.post_receive(2, memory.canary(10))
    sending = asyncio.create_task(sender.send(1, memory.pattern(memory.big_bytes, 0)))
    await until_arriving(arriving)
    await (sender if closing == "sender" else receiver).close()
    for ended in (arriving.wait(), unmatched.wait(), sending):
        with pytest.raises(PeerLost):
            await asyncio.wait_for(ended, 20.0)
    await until(lambda: not sender.alive and not receiver.alive)
    assert await arriving.cancel(5.0) is CancelOutcome.PEER_LOST
    assert await unmatched.cancel(0.0) is CancelOutcome.PEER_LOST
    await asyncio.gather(sender.drained(), receiver.drained())


async def test_no_byte_is_written_after_close_returns(pair: Pair, memory: Memory) -> None:
    sender, receiver = pair
    buffer = memory.canary(memory.big_bytes)
    receive = receiver.post_receive(1, buffer)
    sending = asyncio.create_task(sender.send(1, memory.pattern(memory.big_bytes, 0)))
    await until_arriving(receive)
    await receiver.close()
    assert await receive.cancel(0.0) is CancelOutcome.PEER_LOST
    buffer.copy_(memory.canary(memory.big_bytes))
    await asyncio.gather(sending, return_exceptions=True)
    await sender.drained()
    assert untouched(buffer)


async def test_a_closed_connection_takes_nothing_more(pair: Pair, memory: Memory) -> None:
    sender, receiver = pair
    await sender.close()
    await sender.close()
    await until(lambda: not receiver.alive)
    for end in pair:
        with pytest.raises(PeerLost):
            end.post_receive(1, memory.canary(1))
        with pytest.raises(PeerLost):
            await end.send(1, memory.canary(1))


async def test_a_tag_that_nobody_posted_lands_nowhere(open_peer: OpenPeer, memory: Memory) -> None:
    here, there = await open_peer("here"), await open_peer("there")
    sender, receiver = await join(here, there, "here")
    buffer = memory.canary(100)
    receive = receiver.post_receive(1 << 32 | 5, buffer)
    for stale in (5, 1 << 32 | 4, 1 << 33 | 5):
        await sender.send(stale, memory.pattern(100, 0))
    await until(lambda: there.stats().stale_messages == 3)
    assert untouched(buffer)
    await asyncio.gather(sender.send(receive.tag, memory.pattern(100, 1)), receive.wait())
    await sender.send(receive.tag, memory.pattern(100, 2))
    await until(lambda: there.stats().stale_messages == 4)
    assert same(buffer, memory.pattern(100, 1))


@pytest.mark.parametrize("expected", [10, 100_000, 8 * MIB])
@pytest.mark.parametrize("change", [-1, 1, 12 * MIB])
async def test_a_message_of_another_size_is_typed_and_never_written(
    pair: Pair, expected: int, change: int, memory: Memory
) -> None:
    sender, receiver = pair
    around = memory.canary(expected + 4096)
    receive = receiver.post_receive(1, around[2048 : 2048 + expected])
    await sender.send(1, memory.pattern(expected + change, 0))
    with pytest.raises(Truncated, match=str(expected + change)):
        await receive.wait()
    assert await receive.cancel(0.0) is CancelOutcome.DRAINED
    assert untouched(around)
    following = receiver.post_receive(2, memory.canary(10))
    await asyncio.gather(sender.send(2, memory.pattern(10, 0)), following.wait())


async def test_two_peers_may_use_the_same_tag(open_peer: OpenPeer, memory: Memory) -> None:
    receiver = await open_peer("receiver")
    ends = [await join(await open_peer(name), receiver, name) for name in ("a", "b")]
    assert [there.peer_name for _, there in ends] == ["a", "b"]
    assert [here.peer_name for here, _ in ends] == ["receiver", "receiver"]
    buffers = [memory.canary(5000), memory.canary(5000)]
    receives = [there.post_receive(9, buffer) for (_, there), buffer in zip(ends, buffers, strict=True)]
    await asyncio.gather(*(here.send(9, memory.pattern(5000, i)) for i, (here, _) in enumerate(ends)))
    await asyncio.gather(*(receive.wait() for receive in receives))
    assert all(same(buffer, memory.pattern(5000, i)) for i, buffer in enumerate(buffers))


async def test_a_tag_posted_for_one_peer_means_nothing_to_another(open_peer: OpenPeer, memory: Memory) -> None:
    receiver = await open_peer("receiver")
    _, granted = await join(await open_peer("a"), receiver, "a")
    other, _ = await join(await open_peer("b"), receiver, "b")
    buffer = memory.canary(100)
    granted.post_receive(9, buffer)
    await other.send(9, memory.pattern(100, 0))
    await until(lambda: receiver.stats().stale_messages == 1)
    assert untouched(buffer)


async def test_a_lost_peer_comes_back_under_its_name(open_peer: OpenPeer, memory: Memory) -> None:
    sender, receiver = await open_peer("sender"), await open_peer("receiver")
    for i in range(3):
        here, there = await join(sender, receiver)
        receive = there.post_receive(1, memory.canary(10))
        await asyncio.gather(here.send(1, memory.pattern(10, i)), receive.wait())
        await here.close()
        await until(lambda there=there: not there.alive)  # type: ignore[misc]
    assert sender.stats().connections == receiver.stats().connections == 0


async def test_a_stranger_who_bears_a_peers_name_is_not_taken_for_it(open_peer: OpenPeer, memory: Memory) -> None:
    peer, stranger, receiver = [await open_peer(name) for name in ("sender", "sender", "receiver")]
    here = await peer.connect(receiver.address, 30.0, SECRET)
    there = await receiver.wait_for_peer("sender", 30.0, SECRET)
    for secret in (NO_SECRET, bytes(16 * [7])):
        imposed = await stranger.connect(receiver.address, 30.0, secret)
        strange = await receiver.wait_for_peer("sender", 30.0, secret)
        assert strange is not there
        assert await receiver.wait_for_peer("sender", 30.0, SECRET) is there
        await imposed.close()
        await until(lambda strange=strange: not strange.alive)  # type: ignore[misc]
        assert await receiver.wait_for_peer("sender", 30.0, SECRET) is there
    receive = there.post_receive(1, memory.canary(10))
    await asyncio.gather(here.send(1, memory.pattern(10, 0)), receive.wait())


async def test_a_peer_that_connects_again_is_found_by_the_connection_that_stands(open_peer: OpenPeer) -> None:
    sender, receiver = await open_peer("sender"), await open_peer("receiver")
    await sender.connect(receiver.address, 30.0, SECRET)
    first = await receiver.wait_for_peer("sender", 30.0, SECRET)
    again = await sender.connect(receiver.address, 30.0, SECRET)
    await until(lambda: receiver.stats().connections == 2)
    second = await receiver.wait_for_peer("sender", 30.0, SECRET)
    assert second is not first
    await again.close()
    await until(lambda: not second.alive)
    assert await receiver.wait_for_peer("sender", 30.0, SECRET) is first


async def test_connections_that_nobody_waits_for_are_few(open_peer: OpenPeer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("common.transport.peers.MAX_UNCLAIMED", 2)
    sender, receiver = await open_peer("sender"), await open_peer("receiver")
    standing = await sender.connect(receiver.address, 30.0, SECRET)
    there = await receiver.wait_for_peer("sender", 30.0, SECRET)
    strange = [await sender.connect(receiver.address, 30.0) for _ in range(4)]
    await until(lambda: [one.alive for one in strange] == [False, False, True, True])
    assert standing.alive
    assert await receiver.wait_for_peer("sender", 30.0, SECRET) is there


async def test_connecting_to_nobody_fails_in_time(open_peer: OpenPeer) -> None:
    gone, here = await open_peer("gone"), await open_peer("here")
    address = gone.address
    await gone.close()
    with pytest.raises((PeerLost, TransferTimeout)):
        await asyncio.wait_for(here.connect(address, 2.0), 20.0)
    assert here.stats().connections == 0


async def test_an_end_that_only_connects_has_no_address(open_peer: OpenPeer, memory: Memory) -> None:
    here, there = await open_peer("only connects"), await open_peer("receiver")
    assert here.address == ""
    sender, receiver = await join(here, there, "only connects")
    receive = receiver.post_receive(1, memory.canary(10))
    await asyncio.gather(sender.send(1, memory.pattern(10, 0)), receive.wait())


async def test_waiting_for_a_peer_that_does_not_come_times_out(open_peer: OpenPeer) -> None:
    here = await open_peer("here")
    with pytest.raises(TransferTimeout, match="nobody"):
        await here.wait_for_peer("nobody", 0.01)


async def test_misuse_is_refused(pair: Pair, memory: Memory) -> None:
    sender, receiver = pair
    receiver.post_receive(1, memory.canary(10))
    with pytest.raises(ValueError, match="already posted"):
        receiver.post_receive(1, memory.canary(10))
    for tag in (-1, 1 << 64):
        with pytest.raises(ValueError, match="64-bit"):
            receiver.post_receive(tag, memory.canary(10))
    for bad in (
        memory.canary(10)[::2],
        memory.canary(10).view(2, 5),
        memory.canary(8).view(torch.int32),
        memory.canary(0),
    ):
        with pytest.raises(ValueError, match="contiguous uint8"):
            receiver.post_receive(2, bad)
        with pytest.raises(ValueError, match="contiguous uint8"):
            await sender.send(2, bad)


async def test_stats_count_what_happened(open_peer: OpenPeer, memory: Memory) -> None:
    here, there = await open_peer("here"), await open_peer("there")
    sender, receiver = await join(here, there, "here")
    receive = receiver.post_receive(1, memory.canary(1000))
    await asyncio.gather(sender.send(1, memory.pattern(1000, 0)), receive.wait())
    await sender.send(2, memory.pattern(50, 0))
    await until(lambda: there.stats().stale_messages == 1)
    sent, received = here.stats(), there.stats()
    assert (sent.messages_sent, sent.bytes_sent, sent.connections) == (2, 1050, 1)
    assert (received.messages_received, received.bytes_received, received.connections) == (1, 1000, 1)


async def test_closing_the_endpoint_closes_everything(open_peer: OpenPeer, memory: Memory) -> None:
    here, there = await open_peer("here"), await open_peer("there")
    sender, receiver = await join(here, there, "here")
    receive = receiver.post_receive(1, memory.canary(10))
    await there.close()
    await there.close()
    with pytest.raises(PeerLost):
        await receive.wait()
    await until(lambda: not sender.alive)
    with pytest.raises((FailedPrecondition, TransferError)):
        await there.connect(here.address, 1.0)
    assert there.stats().connections == 0
