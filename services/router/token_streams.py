"""The token stream from one decode worker: one Subscribe call for all of this router's sequences there.

Entries go to receivers by sequence id in plain calls, without a task or an await per token. When the stream breaks,
every receiver is told that its sequence is lost. Knows nothing of what receivers do with tokens.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Protocol

import grpc
from baton.v1 import decode_pb2, decode_pb2_grpc

from common.errors import BatonError, Unavailable
from common.rpc.status import error_from_rpc

_logger = logging.getLogger(__name__)

FIRST_RETRY_S = 0.05
LAST_RETRY_S = 1.0


class TokenReceiver(Protocol):
    """Where the tokens of one sequence go."""

    def on_tokens(self, entry: decode_pb2.SequenceTokens) -> None:
        """New tokens, or the end. The entry is the receiver's to keep."""
        ...

    def on_lost(self) -> None:
        """The worker is gone, and the sequence with it. Nothing follows."""
        ...


class TokenStream:
    """Keeps the stream up and routes what it brings."""

    def __init__(
        self,
        address: str,
        stub: decode_pb2_grpc.DecodeAsyncStub,
        session_id: str,
        on_change: Callable[[], None],
    ) -> None:
        self._address = address
        self._stub = stub
        self._session_id = session_id
        self._on_change = on_change
        self._receivers: dict[int, TokenReceiver] = {}
        self.stands = False

    def add(self, sequence_id: int, receiver: TokenReceiver) -> None:
        """Route a sequence to its receiver. Raises `Unavailable` while the stream is down."""
        if not self.stands:
            raise Unavailable(f"no token stream from {self._address}")
        self._receivers[sequence_id] = receiver

    def remove(self, sequence_id: int) -> None:
        """Forget a sequence; what still arrives for it is dropped."""
        self._receivers.pop(sequence_id, None)

    async def run(self) -> None:
        """Subscribe, again and again, until cancelled."""
        retry_s = FIRST_RETRY_S
        while True:
            try:
                await self._read_one_stream()
            except grpc.aio.AioRpcError as rpc_error:
                error: BatonError = error_from_rpc(rpc_error)
            else:
                error = Unavailable("the worker ended the stream")
            finally:
                was_standing = self.stands
                self._lose_all()
            retry_s = FIRST_RETRY_S if was_standing else min(2 * retry_s, LAST_RETRY_S)
            if was_standing:
                _logger.warning("token stream from %s broke: %s", self._address, error)
            await asyncio.sleep(retry_s)

    async def _read_one_stream(self) -> None:
        request = decode_pb2.SubscribeRequest(session_id=self._session_id)
        call = self._stub.Subscribe(request, wait_for_ready=True)
        try:
            async for batch in call:
                if not self.stands:
                    self.stands = True
                    self._on_change()
                self._route(batch)
        finally:
            call.cancel()

    def _route(self, batch: decode_pb2.TokenBatch) -> None:
        receivers = self._receivers
        for entry in batch.sequences:
            receiver = receivers.get(entry.sequence_id)
            if receiver is not None:
                receiver.on_tokens(entry)

    def _lose_all(self) -> None:
        self.stands = False
        receivers, self._receivers = self._receivers, {}
        for receiver in receivers.values():
            receiver.on_lost()
        self._on_change()
