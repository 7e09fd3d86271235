"""One worker that the router knows: who it is, whether it takes requests, and how loaded it is.

It is a candidate only while its status stream stands and says READY; a decode worker also needs its session. One that
says nothing for some seconds although it said that it would is treated as dead, whatever its connection looks like.
What this router has dispatched since the last status is counted on top of it. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from typing import Protocol, TypeAlias

import grpc
from baton.v1 import decode_pb2_grpc, prefill_pb2, prefill_pb2_grpc, worker_pb2, worker_pb2_grpc

from common.awake_clock import AwakeClock
from common.errors import BatonError
from common.rpc.client import decoded, open_channel
from common.rpc.status import error_from_rpc
from common.telemetry.tracing import Metadata
from services.router.cancellation import is_being_cancelled
from services.router.decode_session import FIRST_RETRY_S, LAST_RETRY_S, DecodeSession
from services.router.last_seen import LastSeen
from services.router.moves import WorkerLife
from services.router.placement import Candidate
from services.router.worker_list import Role

_logger = logging.getLogger(__name__)

STATUS_INTERVAL_MS = 100
SILENCE_S = 5.0  # without a status, after which it is logged
MISSED_STATUSES = 3  # after which a worker that promised them is silent
FIRST_STATUS_S = 5.0  # for the first one of a stream, connecting included; after it another stream is tried


PrefillCall: TypeAlias = "grpc.aio.UnaryStreamCall[prefill_pb2.PrefillRequest, prefill_pb2.PrefillResponse]"


class Owner(Protocol):
    """Who has all workers; its clock ticks."""

    model_digests: frozenset[bytes]
    max_message_bytes: int
    clock: AwakeClock

    def notify(self) -> None:
        """Something changed that candidates depend on."""
        ...

    def drop_unlisted(self) -> None:
        """A worker is idle that is no longer listed."""
        ...


class Worker:
    """One address: its channel, and its status while that is known."""

    def __init__(self, address: str, role: Role, owner: Owner) -> None:
        self.address = address
        self.role = role
        self.seen = LastSeen()
        self._owner = owner
        self.listed = True  # False: takes nothing new, and goes when the last sequence has left it
        self._num_users = 0
        self._dispatched_load = 0  # since the last status
        self._asked_anew = False
        self._trouble = ""  # why its requests must go elsewhere, as was logged
        self._silence: asyncio.TimerHandle | None = None  # runs while there is no status
        self._is_silent = False  # as was logged
        self._watch: grpc.aio.UnaryStreamCall[worker_pb2.WatchStatusRequest, worker_pb2.WorkerStatus] | None = None
        self._heard_s = owner.clock.now_s  # the last status, or the beginning of the stream
        self._patience_s = FIRST_STATUS_S  # without a status, after which it is silent
        self._calls: set[PrefillCall] = set()  # that have not ended
        self.channel = open_channel(address, owner.max_message_bytes)
        self._status_stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(self.channel)
        self._prefill_stub: prefill_pb2_grpc.PrefillAsyncStub = prefill_pb2_grpc.PrefillStub(self.channel)
        decode_stub: decode_pb2_grpc.DecodeAsyncStub = decode_pb2_grpc.DecodeStub(self.channel)
        # A name of its own: a worker that is listed twice, by different addresses, has two sessions.
        session_id = secrets.token_hex(16)
        self.session = DecodeSession(
            address, decode_stub, session_id, owner.max_message_bytes, owner.clock, owner.notify
        )

    @property
    def status(self) -> worker_pb2.WorkerStatus | None:
        """What it said last; None while it is not heard."""
        return self.seen.status

    @status.setter
    def status(self, status: worker_pb2.WorkerStatus | None) -> None:
        self.seen.note(status, time.monotonic())

    @property
    def life(self) -> WorkerLife | None:
        """See `LastSeen.life`."""
        return self.seen.life(f"{self.role.name} {self.address}")

    @property
    def name(self) -> str:
        """The worker's own name, or its address while that is unknown."""
        return self.status.worker_id if self.status is not None else self.address

    @property
    def candidate(self) -> Candidate | None:
        """What placement sees; None if the worker takes no requests."""
        status = self.status
        if status is None or not self.listed or self._trouble:
            return None
        if status.state != worker_pb2.WORKER_STATE_READY:
            return None
        if self.role is Role.PREFILL:
            load = status.num_waiting_tokens
        elif self.session.takes_handoffs:
            load = status.num_open
        else:
            return None
        return Candidate(
            self.address,
            status.layout_fingerprint,
            load + self._dispatched_load,
            status.max_sequence_tokens,
            status.num_at_once,
            status.load_unit_ns * 1e-9,
            status.step_ns * 1e-9,
        )

    @property
    def is_idle(self) -> bool:
        """Whether nothing that was dispatched to it is left."""
        return self._num_users == 0

    def acquire(self, load: int) -> None:
        """A sequence comes; `load` (tokens for prefill, sequences for decode) is what the next status will show."""
        self._num_users += 1
        self._dispatched_load += load

    def release(self) -> None:
        """A sequence has left."""
        self._num_users -= 1
        if not self.listed and self.is_idle:
            self._owner.drop_unlisted()

    def prefill(self, request: prefill_pb2.PrefillRequest, timeout_s: float, metadata: Metadata | None) -> PrefillCall:
        """Begin a call, which is cancelled if the worker falls silent; whoever reads it gets `CancelledError` then."""
        call = self._prefill_stub.Prefill(request, timeout=timeout_s, metadata=metadata)
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        return call

    def suspect(self) -> None:
        """A call to it failed: no candidate until it has said its status anew."""
        if self.status is not None:
            self._watch_anew()

    def look(self) -> None:
        """Treat the worker as dead if it is silent; call it at every tick of the registry's clock."""
        if self._owner.clock.now_s - self._heard_s > self._patience_s:
            self._fall_silent()
        self.session.look()

    def _fall_silent(self) -> None:
        if self.status is not None:
            _logger.warning("%s is silent: its requests go elsewhere", self.address)
        self._heard_s = self._owner.clock.now_s
        self._watch_anew()
        self.session.give_up("the worker is silent")
        for call in tuple(self._calls):
            call.cancel()
        self._owner.notify()

    def _watch_anew(self) -> None:
        self.status = None
        if self._watch is not None:
            self._asked_anew = True
            self._watch.cancel()

    async def run(self) -> None:
        """Keep its streams up until cancelled; then the channel is closed."""
        try:
            async with asyncio.TaskGroup() as streams:
                streams.create_task(self._watch_status())
                if self.role is Role.DECODE:
                    streams.create_task(self.session.run())
        finally:
            if self._silence is not None:
                self._silence.cancel()
            self.status = None
            self._owner.notify()
            await self.channel.close()

    async def _watch_status(self) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            if self._silence is None:
                self._silence = asyncio.get_running_loop().call_later(SILENCE_S, self._note_silence)
            was_known = await self._watch_once()
            self.status = None
            self._owner.notify()
            if self._asked_anew:
                self._asked_anew = False
                continue
            retry_s = FIRST_RETRY_S if was_known else min(2 * retry_s, LAST_RETRY_S)
            await asyncio.sleep(retry_s)

    async def _watch_once(self) -> bool:
        """One status stream from its start to its end; whether it brought anything."""
        request = worker_pb2.WatchStatusRequest(min_interval_ms=STATUS_INTERVAL_MS)
        self._heard_s = self._owner.clock.now_s
        self._patience_s = min(self._patience_s, FIRST_STATUS_S)
        was_known = False
        try:
            self._watch = self._status_stub.WatchStatus(request, wait_for_ready=True)
            async for message in self._watch:
                self._update(decoded(message, self.address))
                was_known = True
        except grpc.aio.AioRpcError as error:
            if was_known:
                _logger.warning("status of %s ended: %s", self.address, error_from_rpc(error))
        except BatonError as error:
            _logger.warning("status of %s ended: %s", self.address, error)
        except Exception:  # the other workers' streams must not end with it
            _logger.exception("status of %s cannot be taken", self.address)
        except asyncio.CancelledError:
            # Either the call was cancelled, by `suspect`, or this task.
            if not self._asked_anew or is_being_cancelled():
                raise
        finally:
            if self._watch is not None:
                self._watch.cancel()
                self._watch = None
        return was_known

    def _note_silence(self) -> None:
        self._is_silent = True
        _logger.warning("%s has not answered for %g s", self.address, SILENCE_S)

    def _heard(self) -> None:
        self._heard_s = self._owner.clock.now_s
        if self._silence is not None:
            self._silence.cancel()
            self._silence = None
        if self._is_silent:
            self._is_silent = False
            _logger.info("%s answers", self.address)

    def _update(self, status: worker_pb2.WorkerStatus) -> None:
        trouble = self._trouble_of(status)
        if trouble != self._trouble:
            self._trouble = trouble
            if trouble:
                _logger.error("%s %s", self.address, trouble)
            else:
                _logger.info("%s is a %s worker of this model now", self.address, self.role.name.lower())
        self._heard()
        # A worker from before there were promises is never silent while its stream stands.
        self._patience_s = MISSED_STATUSES * status.max_interval_ms / 1000 or math.inf
        self.status = status
        self._dispatched_load = 0
        self._owner.notify()

    def _trouble_of(self, status: worker_pb2.WorkerStatus) -> str:
        if status.role != self.role.value:
            return f"is listed as {self.role.name.lower()} worker and says it is none"
        ours = self._owner.model_digests
        if ours and status.model_digest and status.model_digest not in ours:
            return f"serves {status.model!r}, which is not this router's model"
        return ""
