"""Which tokens of which prompts the next step computes. Pure: calls in; messages to the ranks and events out.

A step has `max_step_tokens` tokens. First `reserved_tokens` of them go to the oldest prompt that can run, the rest to
the prompts in order of the policy, one chunk for each. A chunk begins at a block's border and ends at one, unless it
ends the prompt: full blocks can travel at once. What `shortest-remaining` promises (R reserved, B tokens in all):
  * The oldest admitted prompt, with n tokens to compute, is planned within ceil(n / R) steps, whatever arrives.
  * A prompt of at most B - R tokens that finds a row and blocks is planned in the next step, whatever longer
    prompts are there. `admission` says how it finds them, and who waits how long for his own.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

from common.errors import InternalError, InvalidArgument, ResourceExhausted
from common.kvcache.block_hash import hash_blocks, tenant_salt
from common.kvcache.kv_cache_manager import KVCacheManager
from common.worker.rank_messages import FrontStepMessage
from common.worker.sequence import SequenceRequest
from common.worker.step_plan import RemoveRow, SampledToken, Segment, StepPlan, StepResult
from services.prefill.admission import Admission, Refusal, SchedulerLimits
from services.prefill.request import (
    BlocksReady,
    BlocksUnderWay,
    Chunk,
    Event,
    FirstTokenSampled,
    Prompt,
    PromptFailed,
    PromptState,
    Scheduled,
    StepInFlight,
)

_MIN_RETRY_AFTER_S = 0.1
_MAX_RETRY_AFTER_S = 10.0
_NUM_MEASURED = 7  # steps whose median is the time per token: a machine that stood still in one says nothing of a queue


class Scheduler:
    """The prompts of one incarnation of the ranks. Their blocks are those of `kv`, which nobody else uses."""

    def __init__(self, kv: KVCacheManager, limits: SchedulerLimits, model_digest: bytes) -> None:
        if limits.max_step_tokens < 2 * kv.block_size:
            raise InvalidArgument("max_step_tokens", limits.max_step_tokens, "must be at least two blocks")
        self.kv = kv
        self.limits = limits
        self._model_digest = model_digest
        self._admission = Admission(kv, limits)
        self._waiting: dict[Prompt, None] = {}  # in order of arrival, and O(1) to leave
        self._running: dict[Prompt, None] = {}
        self._in_flight: deque[StepInFlight] = deque()
        self._outbox: list[FrontStepMessage] = []
        self._events: list[Event] = []
        self._num_arrivals = 0
        self._num_steps = 0
        self._num_queued_tokens = 0
        self._token_times_s: deque[float] = deque(maxlen=_NUM_MEASURED)  # of the last large steps
        self._first_token_time_s = 0.0  # of the first step, while there was no large one: better than nothing

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens that no plan has yet, of waiting and of running prompts. May be read from another thread."""
        return self._num_queued_tokens + sum(prompt.num_remaining for prompt in list(self._running))

    @property
    def token_s(self) -> float:
        """How long a token takes in a step that has many; 0 while nothing is known."""
        return statistics.median_low(self._token_times_s) if self._token_times_s else self._first_token_time_s

    @property
    def num_in_flight(self) -> int:
        """Plans that the ranks have and whose results are not back."""
        return len(self._in_flight)

    def add(self, request: SequenceRequest) -> Prompt:
        """Queue a prompt. Raises `ResourceExhausted` if the queue is full, `InvalidArgument` if it can never run."""
        num_tokens = len(request.token_ids)
        num_blocks = -(-num_tokens // self.kv.block_size)
        if num_blocks > self.kv.num_blocks:
            limit = f"at most {self.kv.num_blocks * self.kv.block_size} on this worker"
            raise InvalidArgument("sequence.token_ids", num_tokens, limit)
        if len(self._waiting) >= self.limits.max_waiting:
            raise ResourceExhausted(f"{len(self._waiting)} prompts wait for prefill", self._retry_after_s())
        salt = tenant_salt(request.tenant, self._model_digest)
        hashes = hash_blocks(request.token_ids, self.kv.block_size, salt)
        prompt = Prompt(request, self._num_arrivals, hashes, num_blocks)
        self._num_arrivals += 1
        self._num_queued_tokens += num_tokens
        self._waiting[prompt] = None
        return prompt

    def plan(self) -> bool:
        """Plan one step if there is anything to compute. Its messages and events wait to be taken."""
        self._admission.begin_step()
        budget = self.limits.max_step_tokens
        shares: dict[Prompt, int] = {}
        oldest = self._oldest_runnable()
        if oldest is not None:
            reserved = self.limits.reserved_tokens(self.kv.block_size)
            shares[oldest] = self._longest_chunk(oldest.num_remaining, reserved)
            budget -= shares[oldest]
        for prompt in self._in_policy_order():
            have = shares.get(prompt, 0)
            if self._longest_chunk(prompt.num_remaining - have, budget) == 0:
                continue
            if prompt.state is PromptState.WAITING and not self._admit(prompt):
                continue
            # Admission may have found cached blocks, so that less remains than before.
            more = self._longest_chunk(prompt.num_remaining - have, budget)
            shares[prompt] = have + more
            budget -= more
        if shares:
            self._submit(shares)
        return bool(shares)

    def complete(self, result: StepResult) -> None:
        """The oldest plan's result is back: commit its blocks, report what is ready."""
        if not self._in_flight or self._in_flight[0].step_id != result.step_id:
            raise InternalError(f"a result of step {result.step_id}, which is not the oldest in flight")
        step = self._in_flight.popleft()
        answers = {token.row: token for token in result.sampled}
        for chunk in step.chunks:
            self._complete_chunk(chunk, answers.get(chunk.row))
        self._measure(result.compute_ns, sum(chunk.end - chunk.begin for chunk in step.chunks))
        if self._in_flight:
            self._begin(self._in_flight[0])

    def release(self, prompt: Prompt) -> None:
        """The prompt is handed off or given up: it leaves the queue, its row and, as soon as no plan and no send
        uses them, its blocks. Idempotent."""
        if prompt.state is PromptState.WAITING:
            if prompt is next(iter(self._waiting)):
                self._admission.forget_head()
            self._leave_queue(prompt)
        elif prompt.state is PromptState.RUNNING:
            self._leave_row(prompt)
        prompt.state = PromptState.RELEASED
        self._free_if_unused(prompt)

    def begin_read(self, prompt: Prompt) -> None:
        """A send gathers from the prompt's blocks from now on."""
        if prompt.blocks is None:
            raise InternalError("a send would read blocks that are free")
        prompt.num_readers += 1

    def end_read(self, prompt: Prompt) -> None:
        """That send reads no more."""
        assert prompt.num_readers > 0
        prompt.num_readers -= 1
        self._free_if_unused(prompt)

    def take_messages(self) -> list[FrontStepMessage]:
        """What is to be sent to the ranks, in this order; handed out once."""
        messages, self._outbox = self._outbox, []
        return messages

    def take_events(self) -> list[Event]:
        """What happened since the last call. Of released prompts nothing is reported."""
        events, self._events = self._events, []
        return [event for event in events if event.prompt.state is not PromptState.RELEASED]

    def check_integrity(self) -> None:
        """Verify blocks, rows and queues. Raises `InternalError`."""
        self.kv.check_integrity()
        rows = [prompt.row for prompt in self._running] + self._admission.free_rows
        if sorted(rows) != list(range(self.limits.max_rows)):
            raise InternalError("a row is lost, or owned twice")
        if self._num_queued_tokens != sum(prompt.num_tokens for prompt in self._waiting):
            raise InternalError("the waiting tokens are counted wrongly")
        for queue, state in ((self._waiting, PromptState.WAITING), (self._running, PromptState.RUNNING)):
            if any(prompt.state is not state for prompt in queue):
                raise InternalError(f"a prompt that is not {state.value} is in that queue")

    def _longest_chunk(self, num_remaining: int, budget: int) -> int:
        """All that remains if the budget has it, else as many whole blocks as it has."""
        if num_remaining <= budget:
            return num_remaining
        return budget // self.kv.block_size * self.kv.block_size

    def _in_policy_order(self) -> Iterable[Prompt]:
        prompts = [prompt for prompt in self._running if prompt.is_plannable] + list(self._waiting)
        if self.limits.policy == "first-come":
            return sorted(prompts, key=lambda prompt: prompt.arrival)
        return sorted(prompts, key=lambda prompt: (prompt.num_remaining, prompt.arrival))

    def _oldest_runnable(self) -> Prompt | None:
        """The oldest prompt with tokens to plan. If it waits it is admitted; failing that, the oldest that runs."""
        unplanned = (prompt for prompt in self._running if prompt.is_plannable)
        running = min(unplanned, key=lambda prompt: prompt.arrival, default=None)
        head = next(iter(self._waiting), None)
        is_head_oldest = head is not None and (running is None or head.arrival < running.arrival)
        if head is not None and is_head_oldest and self._admit(head):
            return head
        return running

    def _admit(self, prompt: Prompt) -> bool:
        is_head = prompt is next(iter(self._waiting))
        refusal: Refusal | None = self._admission.admit(prompt, is_head)
        if refusal is not None:
            return False
        self._leave_queue(prompt)
        prompt.state = PromptState.RUNNING
        self._running[prompt] = None
        self._outbox.append(prompt.request.add_row(prompt.row))
        self._events.append(Scheduled(prompt, prompt.num_cached))
        if prompt.num_cached:
            self._events.append(BlocksReady(prompt, 0, prompt.num_cached // self.kv.block_size))
        return True

    def _submit(self, shares: dict[Prompt, int]) -> None:
        step = StepInFlight(self._num_steps)
        segments = []
        for prompt, num_tokens in shares.items():
            chunk = Chunk(prompt, prompt.row, prompt.num_scheduled, prompt.num_scheduled + num_tokens)
            segments.append(_segment(chunk))
            step.chunks.append(chunk)
            prompt.num_scheduled = chunk.end
            prompt.num_plans_in_flight += 1
        self._num_steps += 1
        self._in_flight.append(step)
        self._outbox.append(StepPlan(step.step_id, segments))
        if len(self._in_flight) == 1:
            self._begin(step)

    def _begin(self, step: StepInFlight) -> None:
        """It is the oldest in flight: the ranks compute it."""
        for chunk in step.chunks:
            blocks = chunk.blocks(self.kv.block_size)
            if not chunk.prompt.failed:
                self._events.append(BlocksUnderWay(chunk.prompt, blocks.start, blocks.stop, step.step_id))

    def _complete_chunk(self, chunk: Chunk, answer: SampledToken | None) -> None:
        prompt = chunk.prompt
        assert prompt.num_computed == chunk.begin
        prompt.num_computed = chunk.end
        prompt.num_plans_in_flight -= 1
        if answer is not None and answer.error and not prompt.failed:
            prompt.failed = True
            self._events.append(PromptFailed(prompt, answer.error))
        if not prompt.failed:
            self._commit(chunk)
            if chunk.is_last and prompt.state is PromptState.RUNNING:
                if answer is None:
                    raise InternalError(f"no token was sampled for row {chunk.row}")
                self._leave_row(prompt)
                prompt.state = PromptState.COMPUTED
                self._events.append(FirstTokenSampled(prompt, answer))
        self._free_if_unused(prompt)

    def _commit(self, chunk: Chunk) -> None:
        prompt, blocks = chunk.prompt, chunk.blocks(self.kv.block_size)
        assert prompt.blocks is not None
        self.kv.commit(prompt.blocks, prompt.block_hashes, chunk.end // self.kv.block_size)
        self._events.append(BlocksReady(prompt, blocks.start, blocks.stop))

    def _leave_queue(self, prompt: Prompt) -> None:
        del self._waiting[prompt]
        self._num_queued_tokens -= prompt.num_tokens

    def _leave_row(self, prompt: Prompt) -> None:
        # The ranks apply messages in order: a plan in flight is over before the row is removed, and given away.
        del self._running[prompt]
        self._outbox.append(RemoveRow(prompt.row))
        self._admission.return_row(prompt)

    def _free_if_unused(self, prompt: Prompt) -> None:
        unused = prompt.num_plans_in_flight == 0 and prompt.num_readers == 0
        if prompt.state is PromptState.RELEASED and prompt.blocks is not None and unused:
            self._admission.return_blocks(prompt)

    def _measure(self, compute_ns: int, num_tokens: int) -> None:
        newest = compute_ns / 1e9 / num_tokens
        if 2 * num_tokens >= self.limits.max_step_tokens or 0.0 < newest < self.token_s:
            self._token_times_s.append(newest)
        elif not self.token_s:
            # Of a small step each token costs more, which says nothing of a queue.
            self._first_token_time_s = newest

    def _retry_after_s(self) -> float:
        """About the time in which half of what waits is computed."""
        estimate_s = self.num_waiting_tokens * self.token_s / 2
        return min(max(estimate_s, _MIN_RETRY_AFTER_S), _MAX_RETRY_AFTER_S)


def _segment(chunk: Chunk) -> Segment:
    """The first chunk brings the whole block table: all blocks are the prompt's since its admission."""
    prompt = chunk.prompt
    assert prompt.blocks is not None
    return Segment(
        row=chunk.row,
        token_ids=prompt.request.token_ids[chunk.begin : chunk.end].tobytes(),
        position=chunk.begin,
        new_block_ids=list(prompt.blocks.block_ids) if chunk.begin == prompt.num_cached else [],
        sample=chunk.is_last,
        output_index=prompt.request.num_output_tokens,
    )
