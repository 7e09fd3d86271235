"""One NCCL peer: messages are matched over a side channel, and only what has matched reaches NCCL.

The end that was connected to *leads*: it alone decides in which order transfers are queued, whichever way they go, so
the two ends can never wait for each other's next one.

    connecting end sends    ANNOUNCE ─▶ leader matches and queues its receive ─▶ SEND ─▶ queues its send
    leader sends            ANNOUNCE ─▶ other end matches ─▶ READY ─▶ leader queues its send ─▶ RECEIVE ─▶ queues it
    no receive, wrong size  ANNOUNCE ─▶ DROP

A transfer under way cannot be recalled, only aborted together with the connection. It knows no listeners.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

import torch

from common.errors import FailedPrecondition, PeerLost, Truncated
from common.transport.counters import Counters
from common.transport.nccl_communicator import Communicator
from common.transport.posted import MatchList, Receive, check_buffer, check_tag
from common.transport.side_channel import Frame, FrameKind, SideChannel


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """A message that was announced and is not queued yet."""

    buffer: torch.Tensor  # uint8 [num_bytes]
    done: asyncio.Future[None]


class NcclConnection:
    """Made by `NcclEndpoint` after the hello. `on_lost` is called once, when it closes for whatever reason."""

    def __init__(
        self,
        channel: SideChannel,
        communicator: Communicator,
        peer_name: str,
        leads: bool,
        device: torch.device,
        counters: Counters,
        on_lost: Callable[[NcclConnection], None],
    ) -> None:
        self._channel = channel
        self._communicator = communicator
        self._peer_name = peer_name
        self._leads = leads
        self._device = device
        self._counters = counters
        self._on_lost = on_lost
        self._receives = MatchList()
        self._alive = True
        self._num_announced = 0
        self._outgoing: dict[int, _Outgoing] = {}  # by number: announced, not yet queued
        self._matched: dict[int, Receive] = {}  # by number: the leader's messages that are READY
        self._gone = asyncio.Event()
        self._ending: asyncio.Task[None] | None = None
        self._reading = asyncio.create_task(self._read())

    @property
    def peer_name(self) -> str:
        return self._peer_name

    @property
    def lane(self) -> str:
        return "nccl"

    @property
    def alive(self) -> bool:
        return self._alive

    async def send(self, tag: int, buffer: torch.Tensor) -> None:
        check_buffer(buffer)
        check_tag(tag)
        if not self._alive:
            raise self._lost()
        self._check_device(buffer)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        number = self._num_announced
        self._num_announced += 1
        self._outgoing[number] = _Outgoing(buffer, done)
        self._channel.send(Frame(FrameKind.ANNOUNCE, number, tag, buffer.numel()))
        await done

    def post_receive(self, tag: int, buffer: torch.Tensor) -> Receive:
        if not self._alive:
            raise self._lost()
        receive = self._receives.post(tag, buffer)
        try:
            self._check_device(buffer)
        except ValueError:
            self._receives.withdraw(tag)
            raise
        return receive

    async def close(self) -> None:
        self._lose()
        await self.drained()

    async def drained(self) -> None:
        await self._gone.wait()

    async def _read(self) -> None:
        """Obey the other end's frames until it is gone."""
        try:
            while True:
                self._handle(await self._channel.receive())
        except (PeerLost, FailedPrecondition):
            self._lose()

    def _handle(self, frame: Frame) -> None:
        if frame.kind is FrameKind.ANNOUNCE:
            self._match(frame)
        elif frame.kind is FrameKind.DROP:
            self._sent(self._taken(frame.number))
        elif frame.kind is FrameKind.READY and self._leads:
            self._channel.send(Frame(FrameKind.RECEIVE, frame.number))
            self._queue_send(self._taken(frame.number))
        elif frame.kind is FrameKind.SEND and not self._leads:
            self._queue_send(self._taken(frame.number))
        elif frame.kind is FrameKind.RECEIVE and not self._leads and frame.number in self._matched:
            self._queue_receive(self._matched.pop(frame.number))
        else:
            raise FailedPrecondition(f"{frame.kind.name} {frame.number} makes no sense here")

    def _match(self, frame: Frame) -> None:
        receive = self._receives.take(frame.tag)
        if receive is None or frame.num_bytes != receive.buffer.numel():
            self._channel.send(Frame(FrameKind.DROP, frame.number))
            if receive is None:
                self._counters.stale_messages += 1
            else:
                receive.fail(Truncated(f"{frame.num_bytes} bytes for a receive of {receive.buffer.numel()}"))
            return
        receive.begin()
        if self._leads:
            self._channel.send(Frame(FrameKind.SEND, frame.number))
            self._queue_receive(receive)
        else:
            self._matched[frame.number] = receive
            self._channel.send(Frame(FrameKind.READY, frame.number))

    def _taken(self, number: int) -> _Outgoing:
        outgoing = self._outgoing.pop(number, None)
        if outgoing is None:
            raise FailedPrecondition(f"message {number} was never announced, or was answered already")
        return outgoing

    def _queue_send(self, outgoing: _Outgoing) -> None:
        def finish(carried: asyncio.Future[None]) -> None:
            if carried.exception() is None:
                self._sent(outgoing)
            elif not outgoing.done.done():
                outgoing.done.set_exception(self._lost())
                self._lose()

        self._communicator.send(outgoing.buffer).add_done_callback(finish)

    def _queue_receive(self, receive: Receive) -> None:
        def finish(carried: asyncio.Future[None]) -> None:
            if carried.exception() is None:
                self._counters.received(receive.buffer.numel())
                receive.complete()
            else:
                receive.fail(self._lost())
                self._lose()

        self._communicator.receive(receive.buffer).add_done_callback(finish)

    def _sent(self, outgoing: _Outgoing) -> None:
        self._counters.sent(outgoing.buffer.numel())
        if not outgoing.done.done():
            outgoing.done.set_result(None)

    def _lose(self) -> None:
        if not self._alive:
            return
        self._alive = False
        self._reading.cancel()
        self._channel.close()
        self._receives.fail_all(self._lost())
        outgoing, self._outgoing = self._outgoing, {}
        for one in outgoing.values():
            if not one.done.done():
                one.done.set_exception(self._lost())
        self._on_lost(self)
        self._ending = asyncio.create_task(self._end())

    async def _end(self) -> None:
        """Transfers that were queued fail, then those that were only matched: nothing of either is written any more."""
        await self._communicator.abort()
        matched, self._matched = self._matched, {}
        for receive in matched.values():
            receive.fail(self._lost())
        self._gone.set()

    def _lost(self) -> PeerLost:
        return PeerLost(f"the connection to {self._peer_name} was lost")

    def _check_device(self, buffer: torch.Tensor) -> None:
        """NCCL would read or write another device's memory through a communicator that is not connected to it."""
        if buffer.device != self._device:
            raise ValueError(f"a buffer on {buffer.device} for a connection of {self._device}")
