"""What is particular to `inproc://`: scripted faults, and networks that do not see each other."""

from __future__ import annotations

import asyncio

import pytest
import torch

from common.errors import InvalidArgument, PeerLost, Truncated
from common.transport.base import CancelOutcome, Connection
from common.transport.faults import Fault, MessageInfo
from common.transport.inproc import InprocNetwork
from tests.transport.traffic import canary, pattern, until_arriving, untouched


async def faulty_pair(fault: Fault) -> tuple[Connection, Connection]:
    """A pair whose messages under tag 1 suffer the fault."""
    network = InprocNetwork(lambda message: fault if message.tag == 1 else None)
    sender, receiver = network.open("inproc://a", "sender"), network.open("inproc://b", "receiver")
    return await sender.connect("inproc://b", 1.0), await receiver.wait_for_peer("sender", 1.0)


async def test_a_held_message_matches_when_it_is_let_go() -> None:
    gate = asyncio.Event()
    sender, receiver = await faulty_pair(Fault(hold=gate))
    held, passing = receiver.post_receive(1, canary(10)), receiver.post_receive(2, canary(10))
    sending = asyncio.create_task(sender.send(1, pattern(10, 0)))
    await asyncio.gather(sender.send(2, pattern(10, 0)), passing.wait())
    assert await held.cancel(0.0) is CancelOutcome.DRAINED
    buffer = canary(10)
    again = receiver.post_receive(1, buffer)
    assert not sending.done()
    gate.set()
    await asyncio.gather(sending, again.wait())
    assert torch.equal(buffer, pattern(10, 0))


async def test_a_stalled_message_is_in_doubt_until_it_goes_on() -> None:
    gate = asyncio.Event()
    sender, receiver = await faulty_pair(Fault(stall=gate))
    buffer = canary(100)
    receive = receiver.post_receive(1, buffer)
    sending = asyncio.create_task(sender.send(1, pattern(100, 0)))
    await until_arriving(receive)
    assert await receive.cancel(0.0) is CancelOutcome.IN_DOUBT
    assert await receive.cancel(0.01) is CancelOutcome.IN_DOUBT
    gate.set()
    assert await receive.cancel(5.0) is CancelOutcome.DRAINED
    await sending


async def test_a_flipped_byte_arrives_flipped() -> None:
    sender, receiver = await faulty_pair(Fault(flip_byte=3))
    sent, buffer = pattern(10, 0), canary(10)
    receive = receiver.post_receive(1, buffer)
    await asyncio.gather(sender.send(1, sent), receive.wait())
    assert (buffer ^ sent).tolist() == [0, 0, 0, 0xFF, 0, 0, 0, 0, 0, 0]


async def test_a_cut_message_is_truncated() -> None:
    sender, receiver = await faulty_pair(Fault(resize_bytes=9))
    buffer = canary(10)
    receive = receiver.post_receive(1, buffer)
    await sender.send(1, pattern(10, 0))
    with pytest.raises(Truncated):
        await receive.wait()
    assert untouched(buffer)


async def test_a_connection_can_be_lost_in_the_middle_of_a_message() -> None:
    sender, receiver = await faulty_pair(Fault(lose_connection=True))
    buffer = canary(100)
    receive = receiver.post_receive(1, buffer)
    results = await asyncio.gather(sender.send(1, pattern(100, 0)), receive.wait(), return_exceptions=True)
    assert [type(result) for result in results] == [PeerLost, PeerLost]
    assert torch.equal(buffer[:50], pattern(100, 0)[:50])
    assert untouched(buffer[50:])
    assert not sender.alive
    assert not receiver.alive


async def test_a_script_sees_every_message_in_order() -> None:
    seen: list[MessageInfo] = []

    def script(message: MessageInfo) -> Fault | None:
        seen.append(message)
        return None

    network = InprocNetwork(script)
    network.open("inproc://b", "receiver")
    sender = await network.open("inproc://a", "sender").connect("inproc://b", 1.0)
    for tag in (5, 6):
        await sender.send(tag, canary(tag))
    assert seen == [MessageInfo("sender", "receiver", 5, 5, 0), MessageInfo("sender", "receiver", 6, 6, 1)]


async def test_networks_do_not_see_each_other() -> None:
    InprocNetwork().open("inproc://a", "a")
    with pytest.raises(PeerLost):
        await InprocNetwork().open("inproc://b", "b").connect("inproc://a", 1.0)


def test_an_address_is_taken_once_and_free_after_close() -> None:
    network = InprocNetwork()
    first = network.open("inproc://a", "a")
    with pytest.raises(InvalidArgument, match="somebody listens"):
        network.open("inproc://a", "b")
    asyncio.run(first.close())
    network.open("inproc://a", "b")
