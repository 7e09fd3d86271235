"""Sends planned requests when they are due, never waiting for answers, and records how each one ends.

What is sent is made ready ahead of time. A request that cannot be sent because too many are in flight is recorded as
such, never delayed. Knows no protocol (that is the target's) and no other process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, Callable
from dataclasses import dataclass

import msgspec

from common.errors import BatonError, DeadlineExceeded, InternalError
from loadtest.clock import Clock
from loadtest.prompts import PromptMaker
from loadtest.record import GENERATOR_OVERLOADED, INTERRUPTED, OK, Arrival, RequestRecord
from loadtest.targets.base import Account, Target
from loadtest.workload import PlannedRequest

_NUM_PREPARED = 64  # requests that are made ready ahead of the one that is due next


class SendOptions(msgspec.Struct, frozen=True):
    """How one process sends."""

    timeout_s: float  # from due to last token
    max_in_flight: int
    concurrency: int | None = None  # in a closed loop; None: open loop
    stop_sending_s: float | None = None  # of the run's clock; for the closed loop, whose plan has no times


@dataclass(frozen=True, slots=True)
class _Prepared:
    request: PlannedRequest
    body: bytes


class Sender:
    """One run's requests from this process. Used once."""

    def __init__(
        self,
        target: Target,
        prompts: PromptMaker,
        clock: Clock,
        options: SendOptions,
        on_record: Callable[[RequestRecord], None],
    ) -> None:
        self._target = target
        self._prompts = prompts
        self._clock = clock
        self._options = options
        self._on_record = on_record
        self._start_s = 0.0
        self._ready: asyncio.Queue[_Prepared | None] = asyncio.Queue(maxsize=_NUM_PREPARED)
        self._pacing: set[asyncio.Task[None]] = set()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._is_stopped = False

    async def run(self, plan: AsyncIterable[PlannedRequest], start_s: float) -> None:
        """Send everything and wait until all of it has ended. 0 of the run's clock is `start_s` of the clock's.

        Cancelling it ends what is in flight as `Interrupted`.
        """
        self._start_s = start_s
        async with asyncio.TaskGroup() as tasks:
            self._pacing.add(tasks.create_task(self._prepare(plan)))
            if self._options.concurrency is None:
                self._pacing.add(tasks.create_task(self._send_when_due(tasks)))
            else:
                for _ in range(self._options.concurrency):
                    self._in_flight.add(tasks.create_task(self._send_one_by_one()))
            if self._is_stopped:
                self.stop()

    def stop(self) -> None:
        """Send nothing more and end what is in flight as `Interrupted`; `run` then returns."""
        self._is_stopped = True
        for task in self._pacing | self._in_flight:
            task.cancel()

    async def _prepare(self, plan: AsyncIterable[PlannedRequest]) -> None:
        async for request in plan:
            name = f"load-{'warmup-' if request.is_warmup else ''}{request.index}"
            body = self._target.prepare(name, self._prompts.token_ids(request), request.max_tokens)
            await self._ready.put(_Prepared(request, body))
            await asyncio.sleep(0)  # between two long prompts, let what is due be sent
        await self._ready.put(None)

    async def _send_when_due(self, tasks: asyncio.TaskGroup) -> None:
        while (prepared := await self._ready.get()) is not None:
            due_s = prepared.request.due_s
            await self._clock.sleep_until(self._start_s + due_s)
            if len(self._in_flight) >= self._options.max_in_flight:
                self._record_overloaded(prepared.request)
                continue
            task = tasks.create_task(self._send(prepared, due_s))
            self._in_flight.add(task)
            task.add_done_callback(self._in_flight.discard)

    async def _send_one_by_one(self) -> None:
        """One of the closed loop's places: a request is due when the place is free."""
        await self._clock.sleep_until(self._start_s)
        stop_s = self._options.stop_sending_s
        while (prepared := await self._ready.get()) is not None and (stop_s is None or self._now_s() < stop_s):
            await self._send(prepared, self._now_s())
        self._end_closed_loop()

    def _end_closed_loop(self) -> None:
        """Wake the places that wait for a request, and the preparation that waits for them."""
        for task in self._pacing:
            task.cancel()
        while not self._ready.empty():
            self._ready.get_nowait()
        self._ready.put_nowait(None)

    async def _send(self, prepared: _Prepared, due_s: float) -> None:
        request = prepared.request
        arrivals: list[Arrival] = []
        account = Account()
        outcome, detail = INTERRUPTED, "the run was stopped"
        sent_s = self._now_s()
        timeout_s = self._options.timeout_s - (sent_s - due_s)
        try:
            async with asyncio.timeout(timeout_s):
                account = await self._target.generate(
                    prepared.body, max(0.0, timeout_s), lambda count: arrivals.append(Arrival(self._now_s(), count))
                )
            outcome, detail = (OK, "") if arrivals else (InternalError.__name__, "the answer ended without a token")
        except TimeoutError:
            outcome, detail = DeadlineExceeded.__name__, f"not finished {self._options.timeout_s:g} s after it was due"
        except BatonError as error:
            outcome, detail = type(error).__name__, str(error)
        finally:
            self._on_record(
                RequestRecord(
                    index=request.index,
                    due_s=due_s,
                    sent_s=sent_s,
                    ended_s=self._now_s(),
                    num_prompt_tokens=request.num_prompt_tokens,
                    max_tokens=request.max_tokens,
                    arrivals=tuple(arrivals),
                    outcome=outcome,
                    detail=detail,
                    is_warmup=request.is_warmup,
                    num_cached_tokens=account.num_cached_tokens,
                    lifetime_ns=account.lifetime_ns,
                )
            )

    def _record_overloaded(self, request: PlannedRequest) -> None:
        now_s = self._now_s()
        self._on_record(
            RequestRecord(
                index=request.index,
                due_s=request.due_s,
                sent_s=now_s,
                ended_s=now_s,
                num_prompt_tokens=request.num_prompt_tokens,
                max_tokens=request.max_tokens,
                arrivals=(),
                outcome=GENERATOR_OVERLOADED,
                detail=f"{self._options.max_in_flight} requests in flight in this process already",
                is_warmup=request.is_warmup,
            )
        )

    def _now_s(self) -> float:
        return self._clock.now_s() - self._start_s
