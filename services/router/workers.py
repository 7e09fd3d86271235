"""The workers that the router knows: who is there, who is ready, and how loaded each is.

Addresses come from the settings and from a file (`worker_list`). A worker is a candidate only
while its status stream stands and says READY; a decode worker also needs its session. What this router has
dispatched since the last status is counted on top of it. Knows nothing of requests.
"""

from __future__ import annotations

import asyncio
import logging
import math
import secrets
import time
from collections.abc import Iterable
from pathlib import Path

import grpc
from baton.v1 import decode_pb2_grpc, prefill_pb2_grpc, worker_pb2, worker_pb2_grpc

from common.errors import BatonError
from common.rpc.client import decoded, open_channel
from common.rpc.status import error_from_rpc
from services.router.cancellation import is_being_cancelled
from services.router.decode_session import FIRST_RETRY_S, LAST_RETRY_S, DecodeSession
from services.router.last_seen import LastSeen
from services.router.moves import WorkerLife
from services.router.placement import Candidate
from services.router.worker_list import Role, WorkersFile

_logger = logging.getLogger(__name__)

STATUS_INTERVAL_MS = 100
SILENCE_S = 5.0  # without a status, after which it is logged


class Worker:
    """One address: its channel, and its status while that is known."""

    def __init__(self, address: str, role: Role, registry: WorkerRegistry) -> None:
        self.address = address
        self.role = role
        self.seen = LastSeen()
        self._registry = registry
        self.listed = True  # False: takes nothing new, and goes when the last sequence has left it
        self._num_users = 0
        self._dispatched_load = 0  # since the last status
        self._asked_anew = False
        self._trouble = ""  # why its requests must go elsewhere, as was logged
        self._silence: asyncio.TimerHandle | None = None  # runs while there is no status
        self._is_silent = False  # as was logged
        self._watch: grpc.aio.UnaryStreamCall[worker_pb2.WatchStatusRequest, worker_pb2.WorkerStatus] | None = None
        self.channel = open_channel(address, registry.max_message_bytes)
        self._status_stub: worker_pb2_grpc.WorkerAsyncStub = worker_pb2_grpc.WorkerStub(self.channel)
        self.prefill_stub: prefill_pb2_grpc.PrefillAsyncStub = prefill_pb2_grpc.PrefillStub(self.channel)
        decode_stub: decode_pb2_grpc.DecodeAsyncStub = decode_pb2_grpc.DecodeStub(self.channel)
        # A name of its own: a worker that is listed twice, by different addresses, has two sessions.
        session_id = secrets.token_hex(16)
        self.session = DecodeSession(address, decode_stub, session_id, registry.max_message_bytes, registry.notify)

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
            self.address, status.layout_fingerprint, load + self._dispatched_load, status.max_sequence_tokens
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
            self._registry.drop_unlisted()

    def suspect(self) -> None:
        """A call to it failed: no candidate until it has said its status anew."""
        if self.status is not None and self._watch is not None:
            self.status = None
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
            self._registry.notify()
            await self.channel.close()

    async def _watch_status(self) -> None:
        retry_s = FIRST_RETRY_S
        while True:
            if self._silence is None:
                self._silence = asyncio.get_running_loop().call_later(SILENCE_S, self._note_silence)
            was_known = await self._watch_once()
            self.status = None
            self._registry.notify()
            if self._asked_anew:
                self._asked_anew = False
                continue
            retry_s = FIRST_RETRY_S if was_known else min(2 * retry_s, LAST_RETRY_S)
            await asyncio.sleep(retry_s)

    async def _watch_once(self) -> bool:
        """One status stream from its start to its end; whether it brought anything."""
        request = worker_pb2.WatchStatusRequest(min_interval_ms=STATUS_INTERVAL_MS)
        self._watch = self._status_stub.WatchStatus(request, wait_for_ready=True)
        was_known = False
        try:
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
            self._watch.cancel()
        return was_known

    def _note_silence(self) -> None:
        self._is_silent = True
        _logger.warning("%s has not answered for %g s", self.address, SILENCE_S)

    def _heard(self) -> None:
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
        self.status = status
        self._dispatched_load = 0
        self._registry.notify()

    def _trouble_of(self, status: worker_pb2.WorkerStatus) -> str:
        if status.role != self.role.value:
            return f"is listed as {self.role.name.lower()} worker and says it is none"
        ours = self._registry.model_digests
        if ours and status.model_digest and status.model_digest not in ours:
            return f"serves {status.model!r}, which is not this router's model"
        return ""


class WorkerRegistry:
    """All workers. `run` keeps their streams and the list itself up to date."""

    def __init__(
        self,
        prefill: Iterable[str],
        decode: Iterable[str],
        *,
        max_message_bytes: int,
        workers_file: Path | None = None,
        file_interval_s: float = 1.0,
        model_digests: frozenset[bytes] = frozenset(),
        restart_timeout_s: float = 0.0,
    ) -> None:
        """`model_digests`: of workers that serve the router's model; empty if it cannot say. `restart_timeout_s`: how
        long a worker that was ready counts as coming back."""
        self.model_digests = model_digests
        self.max_message_bytes = max_message_bytes
        self._static = {(address, Role.PREFILL) for address in prefill}
        self._static |= {(address, Role.DECODE) for address in decode}
        self._workers_file = WorkersFile(workers_file) if workers_file is not None else None
        self._file_interval_s = file_interval_s
        self._restart_timeout_s = restart_timeout_s
        self._workers: dict[tuple[str, Role], Worker] = {}
        self._runs: dict[tuple[str, Role], asyncio.Task[None]] = {}
        self._changed = asyncio.Event()

    def notify(self) -> None:
        """Something changed that candidates depend on."""
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    async def wait_changed(self) -> None:
        """Return at the next change."""
        await self._changed.wait()

    def candidates(self, role: Role) -> list[Candidate]:
        """The workers of a role that take requests now."""
        # A copy: metrics are read on another thread.
        found = (worker.candidate for worker in tuple(self._workers.values()) if worker.role is role)
        return [candidate for candidate in found if candidate is not None]

    def worker(self, role: Role, address: str) -> Worker:
        """The worker of a candidate that was taken from `candidates` without an await in between."""
        return self._workers[address, role]

    def life_of(self, worker: str) -> WorkerLife | None:
        """The life that the worker of another life lives now, as far as that is known."""
        lives = (known.life for known in self._workers.values())
        return next((life for life in lives if life is not None and life.worker == worker), None)

    def starts_until_s(self, role: Role, num_tokens: int) -> float:
        """Until when some worker of the role counts as on its way to take so long a sequence; see `LastSeen`."""
        listed = (worker for worker in self._workers.values() if worker.role is role and worker.listed)
        return max(
            (worker.seen.starts_until_s(num_tokens, self._restart_timeout_s) for worker in listed), default=-math.inf
        )

    @property
    def block_size(self) -> int:
        """Tokens in a block, as the first worker that is known says; 0 if none is."""
        return next((w.status.block_size for w in self._workers.values() if w.status is not None), 0)

    @property
    def has_pair(self) -> bool:
        """Whether some prefill and some decode worker could take a request together now."""
        fingerprints = [{c.layout_fingerprint for c in self.candidates(role)} for role in Role]
        return bool(fingerprints[0] & fingerprints[1])

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as runs:
            self._set_workers(runs, self._static)
            while self._workers_file is not None:
                listed = self._workers_file.read()
                if listed is not None:
                    self._set_workers(runs, self._static | listed)
                await asyncio.sleep(self._file_interval_s)
            await asyncio.Event().wait()

    def drop_unlisted(self) -> None:
        """Let go of workers that are no longer listed and that no sequence uses."""
        for key, worker in list(self._workers.items()):
            if not worker.listed and worker.is_idle:
                self._runs.pop(key).cancel()
                del self._workers[key]

    def _set_workers(self, runs: asyncio.TaskGroup, wanted: set[tuple[str, Role]]) -> None:
        for key in wanted - self._workers.keys():
            worker = self._workers[key] = Worker(*key, self)
            self._runs[key] = runs.create_task(worker.run())
        for key, worker in self._workers.items():
            worker.listed = key in wanted
        self.drop_unlisted()
        self.notify()
