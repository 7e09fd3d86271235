"""Runs each output of a request through a prefill and a decode worker, and again through others when it must move.

The choice's token log is all the state that a move needs. What one attempt does is in `attempt`.

    place ──► Open ──► Prefill + tokens ──► FINISHED ──► the choice is complete
      ▲                     │
      └── prompt + log ◄────┴─ PREEMPTED, LOST, or a worker that drains or failed: see `moves`
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import BatonError, Unavailable
from services.router import lifetime
from services.router.attempt import Attempts, Moved, Pair, RequestPlan
from services.router.cancellation import is_being_cancelled
from services.router.choice import Choice
from services.router.expected_wait import Outlook, ServiceTimes, step_s, worker_wait_s
from services.router.moves import Failure, MoveLimits, Moves, Patience, Reason, reason_of
from services.router.placement import LocalPrefill, Penalties, capacities, place
from services.router.sequence_receiver import FirstToken
from services.router.worker import Worker
from services.router.worker_list import Role
from services.router.workers import WorkerRegistry

_logger = logging.getLogger(__name__)

_SUSPICIOUS = (Reason.DIED, Reason.UNREACHABLE)
_PENALIZED = (Reason.FULL, Reason.UNREACHABLE, Reason.FAILED)


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """How patient the dispatcher is, and its policies."""

    moves: MoveLimits
    local_prefill: LocalPrefill = LocalPrefill.NEVER
    first_token: FirstToken = FirstToken.EAGER


class Dispatcher:
    """Finds a pair for every attempt, and decides whether a failed one is followed by another."""

    def __init__(self, registry: WorkerRegistry, rng: random.Random, limits: DispatchLimits) -> None:
        self._registry = registry
        self._rng = rng
        self._penalties = Penalties()
        self._service = ServiceTimes()
        self.limits = limits
        self.attempts = Attempts(limits.first_token)

    async def run(self, plan: RequestPlan, choices: Sequence[Choice]) -> None:
        """Complete all choices. The first leads: the others start on its pair once its prompt is cached there."""
        leader = _ChoiceRun(self, plan, choices[0])
        if len(choices) == 1:
            await leader.run()
            return
        async with asyncio.TaskGroup() as runs:
            runs.create_task(leader.run())
            await leader.prefilled.wait()
            for choice in choices[1:]:
                runs.create_task(_ChoiceRun(self, plan, choice).run(leader.pair))

    @property
    def capacities(self) -> list[int]:
        """See `placement.capacities`, of the workers that are ready."""
        candidates = self._registry.candidates
        return capacities(candidates(Role.PREFILL), candidates(Role.DECODE), self.limits.local_prefill)

    @property
    def has_place(self) -> bool:
        """Whether a new request would find workers now."""
        if self.limits.local_prefill is LocalPrefill.NEVER:
            return self._registry.has_pair
        return bool(self._registry.candidates(Role.DECODE))

    async def wait_for_place(self) -> None:
        """Return when a new request would find workers. Raises `Unavailable` if none become ready in time."""
        patience = self._patience(has_output=False)
        while not self.has_place:
            prefills, decodes = (self._registry.candidates(role) for role in Role)
            starts_until_s = self._starts_until_s(0, 0, bool(prefills), bool(decodes))
            await self._wait_changed(patience, starts_until_s, _missing(self.limits.local_prefill))

    def outlook(self, max_tokens: int | None, left_s: float) -> Outlook:
        """What a request that comes now has before it."""
        prefills, decodes = (self._registry.candidates(role) for role in Role)
        wait_s = worker_wait_s(prefills, decodes, self.limits.local_prefill)
        return Outlook(wait_s, self._service.expected(max_tokens, step_s(decodes)), left_s)

    def cut_off(self, choice: Choice) -> None:
        """An output ended before it was complete."""
        self._service.cut_off(len(choice.tokens))

    def moves(self) -> Moves:
        """For an output that begins."""
        return Moves(self.limits.moves, self._registry.life_of, self._rng)

    def failed(self, reason: Reason, cause: BatonError, blamed: Sequence[Worker]) -> None:
        """An attempt failed with these workers: others are asked before them for a while."""
        for worker in blamed:
            if reason in _PENALIZED:
                self._penalties.blame(worker.address, time.monotonic())
            # Of two that could not reach each other, both may stand: they stay candidates.
            if reason in _SUSPICIOUS and isinstance(cause, Unavailable):
                worker.suspect()

    def succeeded(self, pair: Pair, choice: Choice) -> None:
        """An attempt ended well."""
        for worker in (pair.first, pair.decode):
            self._penalties.forgive(worker.address)
        took = choice.lifetime
        if not took.num_migrations:
            first_token_s = (took.prefill_ns + took.exposed_handoff_ns) * 1e-9
            self._service.served(first_token_s, took.decode_ns * 1e-9, len(choice.tokens))

    async def place(self, plan: RequestPlan, choice: Choice, avoid: set[str], pinned: str | None) -> Pair:
        """The next pair, waiting for one to become ready if there is none that the sequence fits. Raises
        `Unavailable`."""
        registry, local = self._registry, self.limits.local_prefill
        patience = self._patience(bool(choice.tokens))
        fingerprint = pinned if choice.tokens else None
        num_known, num_tokens = len(plan.prompt_ids) + len(choice.tokens), plan.max_sequence_tokens
        while True:
            known_prefills, known_decodes = registry.candidates(Role.PREFILL), registry.candidates(Role.DECODE)
            # Prefill holds what there is, and is asked for one token more.
            prefills = [c for c in known_prefills if c.holds(num_known + 1)]
            decodes = [c for c in known_decodes if c.holds(num_tokens)]
            avoided = avoid | self._penalties.active(time.monotonic())
            placed = place(prefills, decodes, self._rng, avoided, fingerprint, local)
            if placed is not None:
                prefill, decode = placed
                return Pair(
                    registry.worker(Role.PREFILL, prefill.address) if prefill is not None else None,
                    registry.worker(Role.DECODE, decode.address),
                    decode.layout_fingerprint,
                )
            missing = _missing(local)
            if len(prefills) < len(known_prefills) or len(decodes) < len(known_decodes):
                missing += f": some are too small for a sequence of up to {num_tokens} tokens"
            starts_until_s = self._starts_until_s(num_known + 1, num_tokens, bool(prefills), bool(decodes))
            await self._wait_changed(patience, starts_until_s, missing)

    def _starts_until_s(self, num_known: int, num_tokens: int, has_prefill: bool, has_decode: bool) -> float:
        """Until when whoever is missing counts as on its way."""
        starts_until_s = self._registry.starts_until_s
        of_prefill, of_decode = starts_until_s(Role.PREFILL, num_known), starts_until_s(Role.DECODE, num_tokens)
        if self.limits.local_prefill is not LocalPrefill.NEVER:
            return of_decode
        if has_prefill and has_decode:  # that do not fit together
            return max(of_prefill, of_decode)
        return min(math.inf if has_prefill else of_prefill, math.inf if has_decode else of_decode)

    def _patience(self, has_output: bool) -> Patience:
        moves = self.limits.moves
        patience_s = moves.migration_timeout_s if has_output else moves.placement_timeout_s
        return Patience(patience_s, time.monotonic())

    async def _wait_changed(self, patience: Patience, starts_until_s: float, missing: str) -> None:
        """Until something changed that may bring a place, or `Unavailable` for want of what is missing."""
        until_s = patience.until_s(time.monotonic(), starts_until_s)
        if until_s is None:
            raise Unavailable(missing)
        with contextlib.suppress(TimeoutError):  # the caller looks again
            async with asyncio.timeout(None if until_s == math.inf else max(0.0, until_s - time.monotonic())):
                await self._registry.wait_changed()


class _ChoiceRun:
    """One output, over as many attempts as it takes."""

    def __init__(self, dispatcher: Dispatcher, plan: RequestPlan, choice: Choice) -> None:
        self.choice = choice
        self.pair: Pair | None = None
        self.prefilled = asyncio.Event()  # the prompt's blocks are cached where `pair` says, or never will be
        self._dispatcher = dispatcher
        self._plan = plan
        self._moves = dispatcher.moves()

    async def run(self, preferred: Pair | None = None) -> None:
        """Until the choice is complete. Raises what the client is to be told."""
        choice = self.choice
        avoid: set[str] = set()  # what has failed this output, as long as there are others
        try:
            while True:
                pair = preferred if preferred is not None and _is_ready(preferred) else None
                preferred = None
                if pair is None:
                    pinned = self.pair.layout_fingerprint if self.pair is not None else None
                    start_ns = time.monotonic_ns()
                    pair = await self._dispatcher.place(self._plan, choice, avoid, pinned)
                    self._plan.record.placed(choice.index, start_ns, pair.first.name, pair.decode.name)
                self.pair = pair
                num_tokens, lives = len(choice.tokens), {w: w.life for w in (pair.first, pair.decode)}
                try:
                    ending = await self._dispatcher.attempts.attempt(self._plan, choice, pair, self.prefilled.set)
                    lifetime.add_decode(choice.lifetime, ending)
                    self._dispatcher.succeeded(pair, choice)
                    break
                except Moved as moved:
                    if is_being_cancelled():
                        # A TaskGroup that is cancelled while a leg of it fails reports the failure alone.
                        raise asyncio.CancelledError from moved
                    if choice.has_ended:
                        break
                    reason = reason_of(moved.cause, any(worker.seen.is_draining for worker in moved.blamed))
                    if reason is not Reason.PREEMPTED:
                        avoid |= {worker.address for worker in moved.blamed}
                    self._dispatcher.failed(reason, moved.cause, moved.blamed)
                    blamed_lives = tuple(life for worker in moved.blamed if (life := lives[worker]) is not None)
                    num_new_tokens = len(choice.tokens) - num_tokens
                    failure = Failure(moved.cause, reason, blamed_lives, bool(choice.tokens), num_new_tokens)
                    await self._prepare_move(failure)
            choice.lifetime.prefill_worker = pair.first.name
            choice.lifetime.decode_worker = pair.decode.name
            choice.complete()
        finally:
            self.prefilled.set()
            if not choice.is_complete:
                self._dispatcher.cut_off(choice)

    async def _prepare_move(self, failure: Failure) -> None:
        pause_s = self._moves.pause_s(failure)
        if pause_s is None:
            raise failure.cause
        self.choice.lifetime.num_migrations += 1
        _logger.info("%s: choice %d moves: %s", self._plan.request_id, self.choice.index, failure.cause)
        if pause_s:
            await asyncio.sleep(min(pause_s, self._plan.remaining_s()))


def _is_ready(pair: Pair) -> bool:
    return pair.first.candidate is not None and pair.decode.candidate is not None


def _missing(local: LocalPrefill) -> str:
    if local is LocalPrefill.NEVER:
        return "no ready pair of a prefill and a decode worker that fit"
    return "no ready decode worker"
