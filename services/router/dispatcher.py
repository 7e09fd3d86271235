"""Runs each output of a request through a prefill and a decode worker, and again through others when it must move.

The choice's token log is all the state that a move needs. What one attempt does is in `attempt`.

    place ──► Open ──► Prefill + tokens ──► FINISHED ──► the choice is complete
      ▲                     │
      └── prompt + log ◄────┴─ PREEMPTED (not counted), LOST, or a worker that failed
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from common.errors import ResourceExhausted, Unavailable
from services.router import lifetime
from services.router.attempt import Attempts, Moved, Pair, RequestPlan
from services.router.cancellation import is_being_cancelled
from services.router.choice import Choice
from services.router.placement import LocalPrefill, capacities, place
from services.router.sequence_receiver import FirstToken
from services.router.worker_list import Role
from services.router.workers import WorkerRegistry

_logger = logging.getLogger(__name__)

FIRST_BACKOFF_S = 0.05
LAST_BACKOFF_S = 1.0


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """How patient the dispatcher is, and its policies."""

    max_worker_losses: int
    placement_timeout_s: float
    migration_timeout_s: float
    local_prefill: LocalPrefill = LocalPrefill.NEVER
    first_token: FirstToken = FirstToken.EAGER


class Dispatcher:
    """Finds a pair for every attempt, and decides whether a failed one is followed by another."""

    def __init__(self, registry: WorkerRegistry, rng: random.Random, limits: DispatchLimits) -> None:
        self._registry = registry
        self._rng = rng
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
        give_up_s = time.monotonic() + self.limits.placement_timeout_s
        while not self.has_place:
            await self._wait_changed(give_up_s, _missing(self.limits.local_prefill))

    async def place(self, plan: RequestPlan, choice: Choice, avoid: set[str], pinned: str | None) -> Pair:
        """The next pair, waiting for one to become ready if there is none that the sequence fits. Raises
        `Unavailable`."""
        limits = self.limits
        patience_s = limits.migration_timeout_s if choice.tokens else limits.placement_timeout_s
        give_up_s = time.monotonic() + patience_s
        registry = self._registry
        fingerprint = pinned if choice.tokens else None
        num_known, num_tokens = len(plan.prompt_ids) + len(choice.tokens), plan.max_sequence_tokens
        while True:
            known_prefills, known_decodes = registry.candidates(Role.PREFILL), registry.candidates(Role.DECODE)
            # Prefill holds what there is, and is asked for one token more.
            prefills = [c for c in known_prefills if c.holds(num_known + 1)]
            decodes = [c for c in known_decodes if c.holds(num_tokens)]
            placed = place(prefills, decodes, self._rng, avoid, fingerprint, limits.local_prefill)
            if placed is not None:
                prefill, decode = placed
                return Pair(
                    registry.worker(Role.PREFILL, prefill.address) if prefill is not None else None,
                    registry.worker(Role.DECODE, decode.address),
                    decode.layout_fingerprint,
                )
            missing = _missing(limits.local_prefill)
            if len(prefills) < len(known_prefills) or len(decodes) < len(known_decodes):
                missing += f": some are too small for a sequence of up to {num_tokens} tokens"
            await self._wait_changed(give_up_s, missing)

    async def _wait_changed(self, give_up_s: float, missing: str) -> None:
        """Until something changed, or `Unavailable` for want of what is missing."""
        try:
            async with asyncio.timeout(max(0.0, give_up_s - time.monotonic())):
                await self._registry.wait_changed()
        except TimeoutError as error:
            raise Unavailable(missing) from error


class _ChoiceRun:
    """One output, over as many attempts as it takes."""

    def __init__(self, dispatcher: Dispatcher, plan: RequestPlan, choice: Choice) -> None:
        self.choice = choice
        self.pair: Pair | None = None
        self.prefilled = asyncio.Event()  # the prompt's blocks are cached where `pair` says, or never will be
        self._dispatcher = dispatcher
        self._plan = plan
        self._num_losses = 0
        self._num_stalls = 0  # attempts in a row that brought no token, or found every place taken
        self._full_since_s: float | None = None  # of time.monotonic(): the first such attempt of those in a row

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
                num_tokens = len(choice.tokens)
                try:
                    ending = await self._dispatcher.attempts.attempt(self._plan, choice, pair, self.prefilled.set)
                    lifetime.add_decode(choice.lifetime, ending)
                    break
                except Moved as moved:
                    if is_being_cancelled():
                        # A TaskGroup that is cancelled while a leg of it fails reports the failure alone.
                        raise asyncio.CancelledError from moved
                    avoid |= {worker.address for worker in moved.blamed}
                    if choice.has_ended:
                        break
                    await self._prepare_move(moved, len(choice.tokens) - num_tokens)
            choice.lifetime.prefill_worker = pair.first.name
            choice.lifetime.decode_worker = pair.decode.name
            choice.complete()
        finally:
            self.prefilled.set()

    async def _prepare_move(self, moved: Moved, num_new_tokens: int) -> None:
        # The place that output had was given to others: nothing is lost, and a place comes free when theirs ends.
        is_full = isinstance(moved.cause, ResourceExhausted) and bool(self.choice.tokens)
        if is_full:
            self._wait_for_room(moved)
        else:
            self._full_since_s = None
        if not moved.preempted and not is_full:
            self._num_losses += 1
            for worker in moved.blamed:
                if isinstance(moved.cause, Unavailable):
                    worker.suspect()
            if self._num_losses > self._dispatcher.limits.max_worker_losses:
                raise moved.cause
        self.choice.lifetime.num_migrations += 1
        _logger.info("%s: choice %d moves: %s", self._plan.request_id, self.choice.index, moved.cause)
        self._num_stalls = 0 if num_new_tokens and not is_full else self._num_stalls + 1
        if self._num_stalls > 1:
            await asyncio.sleep(min(FIRST_BACKOFF_S * 2 ** min(self._num_stalls, 10), LAST_BACKOFF_S))

    def _wait_for_room(self, moved: Moved) -> None:
        """Raises the refusal once they have gone on for as long as a moving sequence waits."""
        now_s = time.monotonic()
        if self._full_since_s is None:
            self._full_since_s = now_s
        if now_s - self._full_since_s >= self._dispatcher.limits.migration_timeout_s:
            raise moved.cause


def _is_ready(pair: Pair) -> bool:
    return pair.first.candidate is not None and pair.decode.candidate is not None


def _missing(local: LocalPrefill) -> str:
    if local is LocalPrefill.NEVER:
        return "no ready pair of a prefill and a decode worker that fit"
    return "no ready decode worker"
