"""How many sequences are under way at once, and who waits: a bounded first-come queue.

`AdmissionQueue` is the pure core (ints in, names of the admitted out); `Admission` lets tasks wait on it. What does
not fit is refused with a hint when to come back, estimated from how fast places came free lately; so is what would wait
here and at the workers (`expected_wait`) for longer than it has.
Knows nothing of prompts, workers or gRPC.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable

from common.errors import ResourceExhausted
from services.router.expected_wait import Outlook

MIN_RETRY_S = 0.1
MAX_RETRY_S = 60.0
_RATE_WEIGHT = 0.1  # of the newest interval in the moving average


class AdmissionQueue:
    """Counts places (one per sequence). First come, first served: a wide request is not overtaken by narrow ones."""

    def __init__(self, max_in_flight: int, max_waiting: int, refuses_late: bool = True) -> None:
        """`refuses_late`: what would wait for longer than it has is refused when it comes."""
        self._refuses_late = refuses_late
        self.max_in_flight = max_in_flight
        self.max_waiting = max_waiting
        self.num_in_flight = 0
        self.num_unread = 0  # places of outputs that are complete and that their clients have not read
        self._waiting: OrderedDict[int, int] = OrderedDict()  # request -> its places
        self._num_waiting_places = 0  # of them
        self._mean_release_s: float | None = None  # mean time between two places coming free
        self._last_release_s: float | None = None

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def enter(self, request: int, num_places: int, outlook: Outlook | None = None) -> bool:
        """True: admitted. False: waiting. Raises `ResourceExhausted` if there is no room to wait in, or no time."""
        if outlook is not None and self._refuses_late:
            self._refuse_late(num_places, outlook)
        if not self._waiting and self.num_in_flight + num_places <= self.max_in_flight:
            self.num_in_flight += num_places
            return True
        if len(self._waiting) >= self.max_waiting:
            message = f"{self.num_in_flight} sequences under way and {len(self._waiting)} requests waiting"
            raise ResourceExhausted(message, self.retry_after_s())
        self._waiting[request] = num_places
        self._num_waiting_places += num_places
        return False

    def wait_s(self, num_places: int) -> float:
        """How long a request that comes now would wait here, at the recent rate."""
        num_missing = self.num_in_flight + self._num_waiting_places + num_places - self.max_in_flight
        return max(0, num_missing) * (self._mean_release_s or 0.0)

    def leave(self, num_places: int, now_s: float) -> list[int]:
        """Give places back. Returns the requests that are admitted now, in order."""
        self.num_in_flight -= num_places
        assert self.num_in_flight >= 0, "more places given back than taken"
        if self._last_release_s is not None:
            interval_s = (now_s - self._last_release_s) / num_places
            mean_s = self._mean_release_s
            self._mean_release_s = interval_s if mean_s is None else mean_s + _RATE_WEIGHT * (interval_s - mean_s)
        admitted = self._admit()
        # An idle router says nothing about how fast places come free: what follows counts only if it stays busy.
        self._last_release_s = now_s if 2 * self.num_in_flight >= self.max_in_flight else None
        return admitted

    def complete(self, num_places: int, now_s: float) -> list[int] | None:
        """Outputs are complete, and wait for their client alone: others may have their places. Returns the requests
        that are admitted now; None, and nothing changed, if as much waits for clients as may be in flight."""
        if self.num_unread + num_places > self.max_in_flight:
            return None
        self.num_unread += num_places
        return self.leave(num_places, now_s)

    def read(self, num_places: int) -> None:
        """The client has read outputs that were complete, or never will."""
        self.num_unread -= num_places
        assert self.num_unread >= 0, "more outputs read than were complete"

    def hand_back(self, num_places: int) -> list[int]:
        """`leave` for places that nobody came to use: they say nothing about how fast places come free."""
        self.num_in_flight -= num_places
        assert self.num_in_flight >= 0, "more places handed back than taken"
        return self._admit()

    def give_up(self, request: int) -> list[int]:
        """Take a waiting request out. Returns the requests that it stood in the way of."""
        self._num_waiting_places -= self._waiting.pop(request)
        return self._admit()

    def retry_after_s(self) -> float:
        """When the queue should have moved by its own length, at the recent rate."""
        mean_s = 1.0 if self._mean_release_s is None else self._mean_release_s
        return min(max(mean_s * (len(self._waiting) + 1), MIN_RETRY_S), MAX_RETRY_S)

    def _refuse_late(self, num_places: int, outlook: Outlook) -> None:
        own_wait_s = self.wait_s(num_places)
        excess_s = outlook.excess_s(own_wait_s)
        if excess_s > 0:
            needs_s = (own_wait_s + outlook.worker_wait_s, outlook.service.now_s)
            message = "about {:.1f} s to wait and {:.1f} s to be served".format(*needs_s)
            message += f", with {outlook.left_s:.1f} s to the deadline"
            raise ResourceExhausted(message, min(max(excess_s, MIN_RETRY_S), MAX_RETRY_S))

    def _admit(self) -> list[int]:
        admitted: list[int] = []
        while self._waiting:
            request, num_places = next(iter(self._waiting.items()))
            if self.num_in_flight + num_places > self.max_in_flight:
                break
            del self._waiting[request]
            self._num_waiting_places -= num_places
            self.num_in_flight += num_places
            admitted.append(request)
        return admitted


class Admission:
    """Tasks waiting on an `AdmissionQueue`."""

    def __init__(self, queue: AdmissionQueue, clock: Callable[[], float] = time.monotonic) -> None:
        self.queue = queue
        self._clock = clock
        self._turns: dict[int, tuple[asyncio.Future[None], int]] = {}
        self._last_request = 0

    @contextlib.asynccontextmanager
    async def places(self, num_places: int, outlook: Outlook | None = None) -> AsyncIterator[Places]:
        """Hold so many places; waits for its turn, and gives up its turn if the waiting task is cancelled."""
        self._last_request += 1
        if not self.queue.enter(self._last_request, num_places, outlook):
            await self._wait_turn(self._last_request, num_places)
        places = Places(self, num_places)
        try:
            yield places
        finally:
            if places.are_complete:
                self.queue.read(num_places)
            else:
                self._wake(self.queue.leave(num_places, self._clock()))

    def complete(self, num_places: int) -> bool:
        """See `AdmissionQueue.complete`; whether it was done."""
        admitted = self.queue.complete(num_places, self._clock())
        if admitted is None:
            return False
        self._wake(admitted)
        return True

    async def _wait_turn(self, request: int, num_places: int) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._turns[request] = (turn, num_places)
        try:
            await turn
        except BaseException:
            if self._turns.pop(request, None) is not None:
                self._wake(self.queue.give_up(request))
            elif not turn.cancelled():
                # Admitted, then cancelled in the same loop turn: the places are its own and go back.
                self._wake(self.queue.hand_back(num_places))
            raise

    def _wake(self, admitted: list[int]) -> None:
        """Tell the admitted that it is their turn. In a loop: clients decide how many of them are gone already."""
        pending = deque(admitted)
        while pending:
            turn, num_places = self._turns.pop(pending.popleft())
            if turn.cancelled():
                # Its task was cancelled and has not run yet: it will find its turn gone.
                pending += self.queue.hand_back(num_places)
            else:
                turn.set_result(None)


class Places:
    """The places of one request."""

    def __init__(self, admission: Admission, num_places: int) -> None:
        self.are_complete = False  # and given to others
        self._admission = admission
        self._num_places = num_places

    def complete(self) -> None:
        """Nothing runs on workers any more: only the client's reading is left. Others may have the places, unless too
        much waits for clients that do not read."""
        if not self.are_complete:
            self.are_complete = self._admission.complete(self._num_places)
