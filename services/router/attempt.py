"""One attempt at one sequence: Open on decode and Prefill on prefill, at once and as one structured task.

If either leg fails, times out, or the client goes away, the other is cancelled and decode is told to Close. Where
decode computes the prompt itself there is no second leg. An attempt ends with the output finished, with `Moved` (the
sequence goes on elsewhere), or with a final error. Knows nothing of what comes before or after it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
from baton.v1 import decode_pb2, kv_pb2, prefill_pb2, sampling_pb2

from common.deadline import CALL_SLACK_S
from common.errors import (
    BatonError,
    Cancelled,
    ConnectionLost,
    DeadlineExceeded,
    FailedPrecondition,
    InternalError,
    InvalidArgument,
    Preempted,
    RanksLost,
    TransferError,
    Unavailable,
    WorkerDraining,
)
from common.rpc.client import decoded
from common.rpc.status import error_from_rpc
from services.router import lifetime
from services.router.cancellation import is_being_cancelled
from services.router.choice import Choice
from services.router.request_record import RequestRecord
from services.router.sequence_receiver import Ending, FirstToken, SequenceReceiver
from services.router.worker import Worker

_logger = logging.getLogger(__name__)

COMPLETION_TIMEOUT_S = 1.0  # for PrefillCompleted, once the output has ended


@dataclass(frozen=True, slots=True)
class RequestPlan:
    """What all outputs of a request have in common."""

    request_id: str
    prompt_ids: Sequence[int]
    sampling: sampling_pb2.SamplingParams  # every field set
    tenant: str
    eos_token_ids: tuple[int, ...]  # empty under ignore_eos
    deadline_s: float  # of time.monotonic()
    record: RequestRecord

    @property
    def max_sequence_tokens(self) -> int:
        """How long an output's sequence may become."""
        return len(self.prompt_ids) + self.sampling.max_tokens

    def remaining_s(self) -> float:
        """Time left; raises `DeadlineExceeded` if there is none."""
        remaining_s = self.deadline_s - time.monotonic()
        if remaining_s <= 0:
            raise DeadlineExceeded("the request's deadline has passed")
        return remaining_s


@dataclass(frozen=True, slots=True)
class SequenceToSend:
    """What both workers are told of a sequence."""

    plan: RequestPlan
    choice: Choice
    sequence_id: int
    timeout_ns: int

    @property
    def num_tokens(self) -> int:
        """Prompt and token log."""
        return len(self.plan.prompt_ids) + len(self.choice.tokens)

    def write_to(self, pb: kv_pb2.Sequence) -> None:
        """Fill in `pb`, where it will be sent from: protobuf copies a message by encoding and decoding it, but token
        ids that are a field of another message as memory."""
        plan = self.plan
        pb.request_id = plan.request_id
        pb.sequence_id = self.sequence_id
        pb.token_ids.extend(plan.prompt_ids)
        pb.token_ids.extend(self.choice.tokens)
        pb.num_prompt_tokens = len(plan.prompt_ids)
        pb.sampling.CopyFrom(plan.sampling)
        pb.choice = self.choice.index
        pb.tenant = plan.tenant
        pb.timeout_ns = self.timeout_ns
        pb.eos_token_ids.extend(plan.eos_token_ids)


@dataclass(frozen=True, slots=True)
class Pair:
    """Where one attempt goes. Without a prefill worker, decode computes the prompt itself."""

    prefill: Worker | None
    decode: Worker
    layout_fingerprint: str

    @property
    def first(self) -> Worker:
        """Who computes the first token."""
        return self.prefill or self.decode


class Moved(Exception):
    """One attempt is over and the sequence is not. `blamed` are those with whom it failed."""

    def __init__(self, cause: BatonError, blamed: tuple[Worker, ...]) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.blamed = blamed


class Attempts:
    """Makes attempts."""

    def __init__(self, first_token: FirstToken = FirstToken.EAGER) -> None:
        self._first_token = first_token
        self._sequence_ids = itertools.count(1)

    async def attempt(self, plan: RequestPlan, choice: Choice, pair: Pair, on_prefilled: Callable[[], None]) -> Ending:
        """Send the sequence to the pair and wait for its end. Raises `Moved` or a final error.

        `on_prefilled` is called when the prompt's blocks are cached on both workers.
        """
        timeout_ns = int(plan.remaining_s() * 1e9)
        sequence = SequenceToSend(plan, choice, next(self._sequence_ids), timeout_ns)
        sequence_id = sequence.sequence_id
        receiver = self._receiver(choice, pair, on_prefilled)
        if pair.prefill is not None:
            pair.prefill.acquire(sequence.num_tokens)
        pair.decode.acquire(1)
        ending: Ending | None = None
        was_opened = False
        try:
            pair.decode.session.add(sequence_id, receiver)
            was_opened = True
            ticket = None if pair.prefill is None else pair.decode.session.new_ticket()
            async with asyncio.TaskGroup() as legs:
                prefilling = None
                if pair.prefill is not None and ticket is not None:
                    leg = self._prefill(plan, pair.prefill, pair.decode, sequence, ticket, receiver, on_prefilled)
                    prefilling = legs.create_task(leg)
                # Behind prefill, which the first token waits for.
                opening = legs.create_task(self._open(plan, pair.decode, sequence, ticket))
                ending = await receiver.ended
                opening.cancel()  # answered, unless the worker is odd
                _raise_unless_finished(ending, pair.decode)
                if not ending.by_worker:
                    pair.decode.session.close(sequence_id)
                if prefilling is not None:
                    if not receiver.is_cut_short and not prefilling.done():
                        # PrefillCompleted may come after the last token.
                        await asyncio.wait((prefilling,), timeout=COMPLETION_TIMEOUT_S)
                    prefilling.cancel()
            return ending
        except Unavailable as error:
            raise Moved(error, (pair.decode,)) from error
        except BaseExceptionGroup as group:
            raise _outcome(group) from group
        finally:
            pair.decode.session.remove(sequence_id)
            if was_opened and ending is None:
                pair.decode.session.close(sequence_id)
            if pair.prefill is not None:
                pair.prefill.release()
            pair.decode.release()

    def _receiver(self, choice: Choice, pair: Pair, on_prefilled: Callable[[], None]) -> SequenceReceiver:
        if pair.prefill is not None:
            return SequenceReceiver(choice, self._first_token)

        def on_local_prefill(prefill: decode_pb2.LocalPrefill) -> None:
            lifetime.add_local_prefill(choice.lifetime, prefill)
            on_prefilled()

        return SequenceReceiver(choice, on_local_prefill=on_local_prefill)

    async def _open(
        self, plan: RequestPlan, decode: Worker, sequence: SequenceToSend, ticket: kv_pb2.Ticket | None
    ) -> None:
        """Without a ticket, decode computes the prompt itself."""
        request = decode_pb2.SessionRequest()
        opening = request.open
        opening.compute_locally = ticket is None
        opening.traceparent = plan.record.traceparent
        opening.ticket_id = 0 if ticket is None else ticket.ticket_id
        sequence.write_to(opening.sequence)
        remaining_s = plan.remaining_s()
        start_ns = time.monotonic_ns()
        try:
            async with asyncio.timeout(remaining_s):
                await decode.session.open(request)
        except TimeoutError as error:
            raise DeadlineExceeded("the request's deadline has passed") from error
        except BatonError as error:
            raise _leg_failure(error, decode) from error
        plan.record.opened(sequence.choice.index, start_ns, decode.name)

    async def _prefill(
        self,
        plan: RequestPlan,
        prefill: Worker,
        decode: Worker,
        sequence: SequenceToSend,
        ticket: kv_pb2.Ticket,
        receiver: SequenceReceiver,
        on_prefilled: Callable[[], None],
    ) -> None:
        request = prefill_pb2.PrefillRequest(ticket=ticket)
        sequence.write_to(request.sequence)
        call = prefill.prefill(request, plan.remaining_s() + CALL_SLACK_S, plan.record.metadata)
        try:
            async for message in call:
                response = decoded(message, prefill.name)
                if response.HasField("first_token"):
                    receiver.on_first_token(response.first_token)
                elif response.HasField("completed"):
                    lifetime.add_prefill(receiver.choice.lifetime, response.completed)
                    on_prefilled()
                    break
        except (grpc.aio.AioRpcError, Unavailable, asyncio.CancelledError) as ended:
            if isinstance(ended, asyncio.CancelledError):
                if is_being_cancelled():
                    raise
                error: BatonError = ConnectionLost(f"{prefill.name} is silent")
            else:
                error = ended if isinstance(ended, Unavailable) else error_from_rpc(ended)
            if receiver.num_decode_entries and receiver.has_first_token:
                # Decode has taken over: all that is missing are measurements.
                _logger.warning("%s: %s after the hand-off: %s", plan.request_id, prefill.name, error)
                return
            # A worker that stops cancels what it serves: this may have been prefill, or decode during the hand-off.
            is_of_both = isinstance(error, TransferError | FailedPrecondition | Cancelled)
            raise _leg_failure(error, *((prefill, decode) if is_of_both else (prefill,))) from ended
        finally:
            call.cancel()
        if not receiver.has_first_token:
            raise _leg_failure(InternalError(f"{prefill.name} sent no first token"), prefill)


def _leg_failure(error: BatonError, *blamed: Worker) -> Exception:
    """What a failed leg means: a move, unless the request itself is at fault or out of time."""
    if isinstance(error, InvalidArgument | DeadlineExceeded):
        return error
    if isinstance(error, Cancelled):
        # We did not cancel it: the worker is shutting down.
        error = WorkerDraining(str(error))
    return Moved(error, blamed)


def _raise_unless_finished(ending: Ending, decode: Worker) -> None:
    if ending.end == decode_pb2.SEQUENCE_END_FINISHED:
        return
    if ending.end == decode_pb2.SEQUENCE_END_PREEMPTED:
        raise Moved(Preempted(f"preempted by {decode.name}"), ())
    if ending.end == decode_pb2.SEQUENCE_END_LOST:
        kind = ConnectionLost if ending.is_disconnect else RanksLost
        raise Moved(kind(f"lost by {decode.name}: {ending.error}"), (decode,))
    if ending.end == decode_pb2.SEQUENCE_END_DEADLINE:
        raise DeadlineExceeded("the request's deadline has passed")
    raise InternalError(f"{decode.name}: {ending.error or 'the sequence failed'}")


def _outcome(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The one thing that a failed attempt means; a final error outweighs a move."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = list(group.exceptions)
    while pending:
        error = pending.pop()
        if isinstance(error, BaseExceptionGroup):
            pending += error.exceptions
        else:
            leaves.append(error)
    return min(leaves, key=lambda error: isinstance(error, Moved))
