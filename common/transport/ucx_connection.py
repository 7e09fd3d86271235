"""One UCX peer: its posted receives, and the operations under way with it. See `base.Connection`.

Tags of UCX are matched per worker, so each end mixes the other's random key into what it sends: wire tag = tag XOR key
is as unique as the tag within a connection, and names nothing on any other. It knows neither listeners nor progress.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import torch
from ucxx._lib.libucxx import TagProbeResult, UCXEndpoint, UCXError, UCXXTag

from common.errors import PeerLost, Truncated
from common.transport.counters import Counters
from common.transport.posted import MatchList, Receive, check_buffer, check_tag
from common.transport.ucx_lane import UNKNOWN_LANE, lane_of
from common.transport.ucx_worker import LoopWorker, as_array


class UcxConnection:
    """Made by `UcxEndpoint` after the hello. `on_lost` is called once, when it closes for whatever reason."""

    def __init__(
        self,
        worker: LoopWorker,
        endpoint: UCXEndpoint,
        peer_name: str,
        own_key: int,
        peer_key: int,
        device: torch.device,
        counters: Counters,
        on_lost: Callable[[UcxConnection], None],
    ) -> None:
        self._worker = worker
        self._endpoint: UCXEndpoint | None = endpoint
        self._peer_name = peer_name
        self._own_key = own_key
        self._peer_key = peer_key
        self._device = device
        self._memory = "host" if device.type == "cpu" else "cuda"
        self._counters = counters
        self._on_lost = on_lost
        self._receives = MatchList()
        self._lane = UNKNOWN_LANE
        self._alive = True
        self._num_under_way = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._gone = asyncio.Event()
        self._quieting: set[asyncio.Task[None]] = set()
        endpoint.set_close_callback(self._on_ucx_closed)
        if not endpoint.alive:
            self._on_ucx_closed()

    @property
    def peer_name(self) -> str:
        return self._peer_name

    @property
    def alive(self) -> bool:
        return self._alive

    @property
    def lane(self) -> str:
        """Of large messages from this end's memory. The last one known, once the connection is closed."""
        if self._endpoint is not None and self._alive:
            self._lane = lane_of(self._endpoint.handle, self._memory)
        return self._lane

    async def send(self, tag: int, buffer: torch.Tensor) -> None:
        check_buffer(buffer)
        check_tag(tag)
        if not self._alive or self._endpoint is None:
            raise PeerLost(f"the connection to {self._peer_name} is closed")
        memory = as_array(buffer)
        try:
            request = self._endpoint.tag_send(memory, UCXXTag(tag ^ self._peer_key))
        except (UCXError, RuntimeError) as error:  # RuntimeError: ucxx has seen the end, and we have not
            raise PeerLost(f"cannot send to {self._peer_name}: {error}") from error
        done: asyncio.Future[UCXError | None] = asyncio.get_running_loop().create_future()
        self._start()
        self._worker.track(request, (memory, buffer), lambda error: self._sent(done, buffer.numel(), error))
        failure = await done
        if failure is not None:
            raise PeerLost(f"the connection to {self._peer_name} was lost: {failure}") from failure

    def post_receive(self, tag: int, buffer: torch.Tensor) -> Receive:
        if not self._alive:
            raise PeerLost(f"the connection to {self._peer_name} is closed")
        return self._receives.post(tag, buffer)

    def offer(self, message: TagProbeResult) -> bool:
        """Take an arrived message if it names a receive of ours; its length is checked before a byte is written."""
        receive = self._receives.take(message.sender_tag.value ^ self._own_key)
        if receive is None:
            return False
        if message.length != receive.buffer.numel():
            self._worker.discard(message)
            receive.fail(Truncated(f"{message.length} bytes for a receive of {receive.buffer.numel()}"))
            return True
        receive.begin()
        self._start()
        self._worker.receive(message, receive.buffer, lambda error: self._received(receive, error))
        return True

    async def close(self) -> None:
        self._lose()
        await self.drained()

    async def drained(self) -> None:
        await self._gone.wait()
        await self._idle.wait()

    def _sent(self, done: asyncio.Future[UCXError | None], num_bytes: int, error: UCXError | None) -> None:
        self._stop()
        if error is None:
            self._counters.sent(num_bytes)
        if not done.cancelled():
            done.set_result(error)

    def _received(self, receive: Receive, error: UCXError | None) -> None:
        if error is None:
            self._stop()
            self._counters.received(receive.buffer.numel())
            receive.complete()
            return
        lost = PeerLost(f"the connection to {self._peer_name} was lost: {error}")
        lost.__cause__ = error
        if self._device.type == "cpu":
            self._stop()
            receive.fail(lost)
        else:
            task = asyncio.create_task(self._fail_when_quiet(receive, lost))
            self._quieting.add(task)
            task.add_done_callback(self._quieting.discard)

    async def _fail_when_quiet(self, receive: Receive, lost: PeerLost) -> None:
        """UCX answers the requests of a lost peer at once, while a copy that it queued on the GPU may still run."""
        try:
            await asyncio.to_thread(torch.cuda.synchronize, self._device)
        finally:
            self._stop()
            receive.fail(lost)

    def _start(self) -> None:
        self._num_under_way += 1
        self._idle.clear()

    def _stop(self) -> None:
        self._num_under_way -= 1
        if self._num_under_way == 0:
            self._idle.set()

    def _on_ucx_closed(self, *_: object) -> None:
        """Called by UCX while it progresses: what has already arrived is taken before the connection is given up."""
        if self._alive:
            self._worker.defer(self._lose)

    def _lose(self) -> None:
        if not self._alive:
            return
        self._alive = False
        self._receives.fail_all(PeerLost(f"the connection to {self._peer_name} was lost"))
        endpoint, self._endpoint = self._endpoint, None
        assert endpoint is not None
        endpoint.remove_close_callback()
        endpoint.close_blocking()
        self._worker.kick()
        self._on_lost(self)
        self._gone.set()
