"""A step under way on a GPU: marks on its stream, and answers on their way to host memory. Knows nothing of kernels."""

from __future__ import annotations

import time

import torch

from common.sampling.device_sampler import SpecialRows
from common.worker.step_plan import SampledToken, Segment, StepPlan, StepResult, no_token, not_finite


class DeviceStep:
    """A step that has been launched."""

    def __init__(self, plan: StepPlan, errors: dict[int, str], clock: StepClock) -> None:
        self._plan = plan
        self._errors = errors
        self._clock = clock
        self._sampled: list[Segment] = []
        self._chunks: list[Segment] = []
        self._token_ids: torch.Tensor | None = None
        self._are_bad: torch.Tensor | None = None
        self._special: SpecialRows | None = None

    def answer(
        self,
        sampled: list[Segment],
        chunks: list[Segment],
        token_ids: torch.Tensor,
        are_bad: torch.Tensor,
        special: SpecialRows | None,
    ) -> None:
        """token_ids, are_bad: [at least one per sampled segment, and per chunk] int32 in host memory, complete when the
        clock has stopped."""
        self._sampled, self._token_ids, self._special = sampled, token_ids, special
        self._chunks, self._are_bad = chunks, are_bad

    def result(self) -> StepResult:
        """Wait for the device and read what was sampled. Touches nothing of later steps."""
        compute_ns = self._clock.wait()
        by_row = {row: SampledToken(row, -1, error=error) for row, error in self._errors.items()}
        if self._token_ids is not None:
            # Members of a batch beyond the segments are padding.
            for segment, token_id in zip(self._sampled, self._token_ids.tolist(), strict=False):
                by_row[segment.row] = SampledToken(segment.row, token_id) if token_id >= 0 else no_token(segment.row)
        if self._special is not None:
            for index, logprobs in zip(self._special.indices, self._special.output.logprobs, strict=True):
                token = by_row[self._sampled[index].row]
                if logprobs is not None and not token.error:
                    by_row[token.row] = SampledToken(token.row, token.token_id, logprobs[0], logprobs[1])
        if self._are_bad is not None:
            for chunk, is_bad in zip(self._chunks, self._are_bad.tolist(), strict=False):
                if is_bad:
                    by_row[chunk.row] = not_finite(chunk.row)
        sampled = [by_row[segment.row] for segment in self._plan.segments if segment.row in by_row]
        return StepResult(self._plan.step_id, sampled, compute_ns)


class StepClock:
    """Marks a step's begin and end on the device's stream."""

    def __init__(self, device: torch.device) -> None:
        self._started_ns = time.perf_counter_ns()
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = (_event(), _event())
            self._events[0].record()

    def stop(self) -> None:
        """The step's work has been enqueued."""
        if self._events is not None:
            self._events[1].record()

    def wait(self) -> int:
        """Wait until the device has passed the end. Returns the nanoseconds between the two marks."""
        if self._events is None:
            return time.perf_counter_ns() - self._started_ns
        begin, end = self._events
        end.synchronize()
        return max(1, int(begin.elapsed_time(end) * 1e6))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
