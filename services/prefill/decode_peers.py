"""The Handoff stream to a decode worker: one channel per address, one stream per sequence, errors of our own tree.

What a stream ends with says that it is about the decode worker: a `TransferError` with the worker's own words, so that
nobody takes it for a failure of prefill. Knows gRPC, and nothing of what is said on the stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import NoReturn

import grpc
from baton.v1 import decode_pb2_grpc, kv_pb2

from common.errors import (
    BatonError,
    Cancelled,
    DeadlineExceeded,
    PeerLost,
    Preempted,
    TransferError,
    TransferTimeout,
    Unavailable,
)
from common.rpc.client import open_channel
from common.rpc.status import error_from_rpc
from common.telemetry.tracing import Metadata

SEND_TIMEOUT_S = 10.0  # messages are small, and the other end only queues them
_FINISH_TIMEOUT_S = 1.0
_NUM_LOOKS = 100  # for the status of a stream that has ended
_LOOK_INTERVAL_S = 0.005
_LOCAL_DETAILS = "Internal error from Core"  # gRPC's own, of a write to a stream whose status is on its way
_Call = grpc.aio.StreamStreamCall[kv_pb2.HandoffRequest, kv_pb2.HandoffResponse]


class HandoffStream:
    """One hand-off's messages. One task receives; any may send."""

    def __init__(self, call: _Call) -> None:
        self._call = call
        self._sending = asyncio.Lock()

    async def send(self, request: kv_pb2.HandoffRequest) -> None:
        """Raises what the stream ended with, or `TransferTimeout` if decode does not read. Cancelling it breaks the
        stream, and so does running out of time."""
        async with self._sending:
            try:
                async with asyncio.timeout(SEND_TIMEOUT_S):
                    await self._call.write(request)
            except TimeoutError as error:
                raise TransferTimeout(f"decode took no message for {SEND_TIMEOUT_S:g} s") from error
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await self._raise_end()

    async def receive(self) -> kv_pb2.HandoffResponse:
        """Raises what the stream ended with; a stream that just ends is `PeerLost`, a message that is none a
        `TransferError`. Cancelling it breaks the stream."""
        try:
            response = await self._call.read()
        except grpc.aio.AioRpcError:
            await self._raise_end()
        if response is grpc.aio.EOF:
            await self._raise_end()
        if not isinstance(response, kv_pb2.HandoffResponse):
            raise TransferError("the decode worker sent what cannot be decoded")
        return response

    async def finish(self) -> None:
        """Say that nothing follows and let the other end do the same. What becomes of the stream matters no more."""
        with contextlib.suppress(TimeoutError, asyncio.InvalidStateError, grpc.aio.AioRpcError):
            async with asyncio.timeout(_FINISH_TIMEOUT_S):
                await self._call.done_writing()
                await self._call.code()

    async def _raise_end(self) -> NoReturn:
        """Raise what decode said when it ended the stream, or gRPC when it broke."""
        for _ in range(_NUM_LOOKS):
            if await self._call.details() != _LOCAL_DETAILS:
                break
            await asyncio.sleep(_LOOK_INTERVAL_S)  # the real status replaces it when it comes
        status = await self._call.code()
        if status is grpc.StatusCode.OK:
            raise PeerLost("the decode worker ended the hand-off")
        rpc_error = grpc.aio.AioRpcError(
            status,
            await self._call.initial_metadata(),
            await self._call.trailing_metadata(),
            await self._call.details(),
        )
        raise _of_decode(error_from_rpc(rpc_error)) from rpc_error


def _of_decode(error: BatonError) -> BatonError:
    """The error as one of the other end. What is no failure of it stays what it is."""
    if isinstance(error, TransferError | Preempted | DeadlineExceeded | Cancelled):
        return error
    kind = PeerLost if isinstance(error, Unavailable) else TransferError
    return kind(f"the decode worker: {error}")


class DecodePeers:
    """Channels to decode workers by address, at most `max_idle` of them unused. Close it when all streams are over."""

    def __init__(self, max_message_bytes: int, max_idle: int) -> None:
        self._max_message_bytes = max_message_bytes
        self._max_idle = max_idle
        self._channels: dict[str, grpc.aio.Channel] = {}  # least recently used first
        self._num_streams: dict[str, int] = {}

    @property
    def num_channels(self) -> int:
        return len(self._channels)

    @contextlib.asynccontextmanager
    async def open(self, address: str, metadata: Metadata | None = None) -> AsyncIterator[HandoffStream]:
        """A stream to the decode worker. `metadata` goes with the call. Leaving the context breaks the stream, unless
        both ends were done."""
        channel = self._channels.pop(address, None) or open_channel(address, self._max_message_bytes)
        self._channels[address] = channel
        self._num_streams[address] = self._num_streams.get(address, 0) + 1
        call = decode_pb2_grpc.DecodeStub(channel).Handoff(metadata=metadata)
        try:
            yield HandoffStream(call)
        finally:
            call.cancel()
            self._num_streams[address] -= 1
            await self._close_idle()

    async def close(self) -> None:
        """Close every channel, and with it what is left of its streams."""
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    async def _close_idle(self) -> None:
        idle = [address for address in self._channels if not self._num_streams[address]]
        excess = idle[: max(0, len(idle) - self._max_idle)]
        closing = []
        for address in excess:
            closing.append(self._channels.pop(address))
            del self._num_streams[address]
        for channel in closing:
            await channel.close()
