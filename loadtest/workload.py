"""What is sent: when each request is due, how long it is, which prefix it shares. Pure and seeded.

A workload is a value; iterating it twice gives the same requests, so that every client process can work out its share
by itself. Lengths beyond the context are refused, or clipped when the user says so, before anything is sent.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import msgspec

from common.errors import InvalidArgument
from loadtest.arrivals import Arrivals
from loadtest.pacing import ClosedLoop, TraceTimes
from loadtest.sizes import RandomSizes, Size, TraceSizes

Pacing: TypeAlias = Arrivals | TraceTimes | ClosedLoop
Sizes: TypeAlias = RandomSizes | TraceSizes


class PlannedRequest(msgspec.Struct, frozen=True, tag="request"):
    """One request as it is to be sent. Its prompt is a function of it and of the seed (`loadtest.prompts`)."""

    index: int
    due_s: float  # of the run's clock; 0 in a closed loop, where a request is due when there is room for it
    num_prompt_tokens: int
    max_tokens: int
    block_ids: tuple[int, ...] = ()
    is_warmup: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """What going through a workload once tells."""

    num_requests: int | None  # None: only the clock ends it
    last_due_s: float
    num_clipped: int


@dataclass(frozen=True, slots=True)
class Workload:
    """All requests of a run. Ends after `num_requests`, after `duration_s`, or with its trace; whichever is first."""

    pacing: Pacing
    sizes: Sizes
    seed: int
    num_requests: int | None = None
    duration_s: float | None = None  # nothing is due, and in a closed loop nothing is sent, from then on
    clip_tokens: int | None = None  # the context that longer requests are cut to

    def __post_init__(self) -> None:
        if self.num_requests is not None and self.num_requests < 1:
            raise InvalidArgument("requests", self.num_requests, "at least 1")
        if self.duration_s is not None and not (math.isfinite(self.duration_s) and self.duration_s > 0):
            raise InvalidArgument("duration", self.duration_s, "seconds, above 0 and finite")
        if self.num_requests is None and self.duration_s is None and self.sizes.num_sizes is None:
            raise InvalidArgument("requests", None, "nothing ends the run: say a number of requests or a duration")

    @property
    def is_endless(self) -> bool:
        """Whether only the clock ends it: a closed loop of random lengths without a number of requests."""
        return self.concurrency is not None and self.num_requests is None and self.sizes.num_sizes is None

    @property
    def concurrency(self) -> int | None:
        """Requests in flight in a closed loop; None if arrivals do not wait for answers."""
        return self.pacing.concurrency if isinstance(self.pacing, ClosedLoop) else None

    def __iter__(self) -> Iterator[PlannedRequest]:
        sizes = self.sizes.draw(self.seed)
        index = 0
        for due_s in self.pacing.due_times_s(self.seed):
            if index == self.num_requests or (self.duration_s is not None and due_s >= self.duration_s):
                return
            size = next(sizes, None)
            if size is None:
                break
            size = self._clipped(size)
            yield PlannedRequest(index, due_s, size.num_prompt_tokens, size.max_tokens, size.block_ids)
            index += 1
        self._check_used_up(index)

    def warm_up(self, count: int) -> Iterator[PlannedRequest]:
        """`count` requests as long as the workload's, with prompts of their own that share nothing with it."""
        sizes = itertools.cycle(itertools.islice(self.sizes.draw(self.seed), count))
        for index, size in enumerate(itertools.islice(sizes, count)):
            size = self._clipped(size)
            yield PlannedRequest(index, 0.0, size.num_prompt_tokens, size.max_tokens, is_warmup=True)

    def describe(self) -> str:
        """In words, for the report."""
        return f"{self.pacing.describe()}; {self.sizes.describe()}"

    def describe_scaling(self, num_planned: int | None, num_clipped: int) -> tuple[str, ...]:
        """What was made other than it is in the trace, or than it was drawn; empty if nothing was."""
        clipped = ""
        if self.clip_tokens is not None and self.is_endless:
            clipped = f"requests beyond the context are clipped to {self.clip_tokens} tokens"
        elif num_clipped:
            share = f"{num_clipped} of {num_planned} requests"
            clipped = f"{share} clipped to the context of {self.clip_tokens} tokens"
        scales = (self.pacing.describe_scale(), self.sizes.describe_scale(), clipped)
        return tuple(text for text in scales if text)

    def _clipped(self, size: Size) -> Size:
        return size if self.clip_tokens is None else size.clipped(self.clip_tokens)

    def _check_used_up(self, num_rows: int) -> None:
        """The trace has no further row: is that the end that was asked for?"""
        if self.num_requests is not None and self.num_requests > num_rows:
            raise InvalidArgument("requests", self.num_requests, f"at most {num_rows}: {self.sizes.describe()}")
        if self.duration_s is not None and isinstance(self.pacing, Arrivals):
            limit = f"the trace's {num_rows} rows do not last that long: {self.sizes.describe()}"
            raise InvalidArgument("duration", self.duration_s, limit)


def check(workload: Workload, context_length: int | None) -> Plan:
    """Refuse a workload with a request that the model's context cannot hold, naming the request."""
    if workload.is_endless:
        _check_largest(workload, context_length)
        return Plan(None, 0.0, 0)
    num_requests = num_clipped = 0
    last_due_s = 0.0
    for request, size in zip(workload, workload.sizes.draw(workload.seed), strict=False):
        num_requests += 1
        last_due_s = request.due_s
        num_clipped += (request.num_prompt_tokens, request.max_tokens) != (size.num_prompt_tokens, size.max_tokens)
        num_tokens = request.num_prompt_tokens + request.max_tokens
        if context_length is not None and num_tokens > context_length:
            shown = f"{request.num_prompt_tokens} + {request.max_tokens} tokens"
            raise InvalidArgument(workload.sizes.name_of(request.index), shown, _context_limit(context_length))
    return Plan(num_requests, last_due_s, num_clipped)


def _check_largest(workload: Workload, context_length: int | None) -> None:
    if context_length is None or workload.clip_tokens is not None:
        return
    largest = workload.sizes.largest_tokens
    if largest is None or largest > context_length:
        shown = "without bound" if largest is None else f"up to {largest} tokens"
        raise InvalidArgument("lengths", shown, _context_limit(context_length))


def _context_limit(context_length: int) -> str:
    return f"the model's context is {context_length} tokens, prompt and output together (--clip cuts what is longer)"
