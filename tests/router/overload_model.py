"""A deployment under a virtual clock: admission, a prefill queue and decode rows, told of by statuses every 100 ms.

What decides is the real thing: `AdmissionQueue`, `expected_wait`, the decode worker's `RowTurnover`.
"""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from common.errors import ResourceExhausted
from services.decode.turnover import RowTurnover
from services.router.admission import AdmissionQueue
from services.router.expected_wait import Outlook, ServiceTimes, worker_wait_s
from services.router.placement import Candidate, LocalPrefill

STATUS_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class Shape:
    """What is offered, and what there is to serve it."""

    rate_per_s: float
    deadline_s: float = 10.0
    num_rows: int = 64
    decode_token_s: float = 0.04
    row_token_s: float = 0.0  # added to each step by each row
    prefill_token_s: float = 0.00005
    mean_prompt_tokens: int = 200
    mean_output_tokens: int = 60
    max_in_flight: int = 512
    is_early: bool = True  # refuse by estimated wait

    @property
    def capacity_per_s(self) -> float:
        """Requests that could be served for ever."""
        rows = self.num_rows / (self.mean_output_tokens * self.step_s(self.num_rows))
        prefill = 1.0 / (self.mean_prompt_tokens * self.prefill_token_s)
        places = self.max_in_flight / (
            self.mean_output_tokens * self.decode_token_s + self.mean_prompt_tokens * self.prefill_token_s
        )
        return min(rows, prefill, places)

    def step_s(self, num_rows: int) -> float:
        """Time of a step with so many rows."""
        return self.decode_token_s + num_rows * self.row_token_s


@dataclass(slots=True)
class Request:
    number: int
    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    has_place: bool = False
    is_over: bool = False
    row_since_s: float | None = None
    num_tokens: int = 0  # so far


@dataclass(slots=True)
class Result:
    num_refused: int = 0
    num_admitted: int = 0
    num_expired: int = 0
    num_in_time: int = 0
    hints_s: list[float] = field(default_factory=list)


class Model:
    """One router, one prefill worker, one decode worker."""

    def __init__(self, shape: Shape, seed: int, warm_up_s: float = 0.0) -> None:
        self.result = Result()
        self._shape = shape
        self._warm_up_s = warm_up_s
        self._rng = random.Random(seed)
        self._now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._queue = AdmissionQueue(shape.max_in_flight, 1024)
        self._service = ServiceTimes()
        self._turnover = RowTurnover()
        self._waiting: dict[int, Request] = {}
        self._prefill: deque[Request] = deque()
        self._is_prefilling = False
        self._ready: deque[Request] = deque()
        self._rows: dict[int, Request] = {}
        self._is_stepping = False
        self._num_open = 0
        self._status = (0, 0, 0.0, 0.0)  # waiting tokens, open sequences, time of a row and of a step
        self._dispatched = [0, 0]

    def run(self, until_s: float) -> Result:
        """Offer requests until then."""
        self._at(0.0, self._tell_status)
        self._at(0.0, self._arrive)
        while self._events and self._events[0][0] <= until_s:
            self._now_s, _, happen = heapq.heappop(self._events)
            happen()
        return self.result

    def burst(self, num_requests: int, at_s: float) -> None:
        """So many more at once."""
        for _ in range(num_requests):
            self._at(at_s, self._offer)

    def _at(self, when_s: float, happen: Callable[[], None]) -> None:
        heapq.heappush(self._events, (when_s, next(self._numbers), happen))

    @property
    def _is_measured(self) -> bool:
        return self._now_s >= self._warm_up_s

    def _tell_status(self) -> None:
        tokens = sum(request.num_prompt_tokens for request in self._prefill)
        step_s = self._turnover.step_s if self._rows else 0.0
        self._status = (tokens, self._num_open, self._turnover.row_s(self._shape.num_rows), step_s)
        self._dispatched = [0, 0]
        self._at(self._now_s + STATUS_INTERVAL_S, self._tell_status)

    def _outlook(self) -> Outlook | None:
        if not self._shape.is_early:
            return None
        tokens, num_open, row_s, step_s = self._status
        prefill = Candidate("p", "x", tokens + self._dispatched[0], 0, 0, self._shape.prefill_token_s)
        decode = Candidate("d", "x", num_open + self._dispatched[1], 0, self._shape.num_rows, row_s)
        wait_s = worker_wait_s([prefill], [decode], LocalPrefill.NEVER)
        return Outlook(wait_s, self._service.expected(None, step_s), self._shape.deadline_s)

    def _arrive(self) -> None:
        self._offer()
        self._at(self._now_s + self._rng.expovariate(self._shape.rate_per_s), self._arrive)

    def _offer(self) -> None:
        shape, rng = self._shape, self._rng
        request = Request(
            next(self._numbers),
            self._now_s,
            rng.randint(1, 2 * shape.mean_prompt_tokens),
            max(1, round(rng.gammavariate(4.0, shape.mean_output_tokens / 4.0))),
        )
        try:
            is_admitted = self._queue.enter(request.number, 1, self._outlook())
        except ResourceExhausted as error:
            self.result.num_refused += self._is_measured
            self.result.hints_s.append(error.retry_after_s)
            return
        self.result.num_admitted += self._is_measured
        self._waiting[request.number] = request
        self._at(self._now_s + shape.deadline_s, lambda: self._expire(request))
        if is_admitted:
            self._admit([request.number])

    def _admit(self, numbers: list[int]) -> None:
        for number in numbers:
            request = self._waiting.pop(number)
            request.has_place = True
            self._num_open += 1
            self._dispatched[0] += request.num_prompt_tokens
            self._dispatched[1] += 1
            self._prefill.append(request)
        self._next_prefill()

    def _next_prefill(self) -> None:
        if not self._is_prefilling and self._prefill:
            request = self._prefill[0]
            self._is_prefilling = True
            self._at(
                self._now_s + request.num_prompt_tokens * self._shape.prefill_token_s,
                lambda: self._prefilled(request),
            )

    def _prefilled(self, request: Request) -> None:
        self._is_prefilling = False
        if self._prefill and self._prefill[0] is request:
            self._prefill.popleft()
        if not request.is_over:
            self._ready.append(request)
            self._fill_rows()
        self._next_prefill()

    def _fill_rows(self) -> None:
        while self._ready and len(self._rows) < self._shape.num_rows:
            request = self._ready.popleft()
            self._rows[request.number] = request
            request.row_since_s = self._now_s
        self._next_step()

    def _next_step(self) -> None:
        if not self._is_stepping and self._rows:
            self._is_stepping = True
            self._at(self._now_s + self._shape.step_s(len(self._rows)), self._stepped)

    def _stepped(self) -> None:
        self._is_stepping = False
        for request in list(self._rows.values()):
            request.num_tokens += 1
            if request.num_tokens >= request.num_output_tokens:
                self._finish(request)
        self._turnover.stepped(self._now_s, is_busy=bool(self._rows))
        self._next_step()

    def _finish(self, request: Request) -> None:
        assert request.row_since_s is not None
        self.result.num_in_time += self._is_measured
        prefill_s = request.num_prompt_tokens * self._shape.prefill_token_s
        self._service.served(prefill_s, self._now_s - request.row_since_s, request.num_output_tokens)
        self._leave(request)

    def _expire(self, request: Request) -> None:
        if request.is_over:
            return
        self.result.num_expired += self._is_measured
        if not request.has_place:
            request.is_over = True
            del self._waiting[request.number]
            self._admit(self._queue.give_up(request.number))
        else:
            self._leave(request)

    def _leave(self, request: Request) -> None:
        request.is_over = True
        if request.num_tokens < request.num_output_tokens:
            self._service.cut_off(request.num_tokens)
        self._num_open -= 1
        if request.row_since_s is not None:
            self._turnover.left(self._now_s - request.row_since_s)
            del self._rows[request.number]
        elif request in self._ready:
            self._ready.remove(request)
        elif request in self._prefill and request is not self._prefill[0]:
            self._prefill.remove(request)
        self._fill_rows()
        self._admit(self._queue.leave(1, self._now_s))
