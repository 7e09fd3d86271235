"""Random arrivals, plans, results and releases: the scheduler's invariants hold after every one of them."""

from __future__ import annotations

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.errors import ResourceExhausted
from common.worker.step_plan import AddRow, RemoveRow, StepPlan
from services.prefill.admission import SchedulerLimits
from services.prefill.request import BlocksReady, FirstTokenSampled, Prompt, PromptState, Scheduled
from tests.prefill.builders import BLOCK_SIZE, answer, make_request, make_scheduler

LIMITS = SchedulerLimits(max_rows=3, max_step_tokens=12, max_waiting=6, max_overtakes=2)


class SchedulerMachine(RuleBasedStateMachine):
    """Ranks that check what they are told, around a small scheduler."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler = make_scheduler(LIMITS, num_blocks=14)
        self.prompts: list[Prompt] = []
        self.plans: deque[StepPlan] = deque()
        self.rows: dict[int, int] = {}  # row -> tokens in its blocks
        self.tables: dict[int, list[int]] = {}
        self.ready: dict[Prompt, int] = {}
        self.readers: list[Prompt] = []

    @rule(num_tokens=st.integers(1, 50), start=st.integers(0, 3))
    def arrive(self, num_tokens: int, start: int) -> None:
        try:
            self.prompts.append(self.scheduler.add(make_request(num_tokens, start=start)))
        except ResourceExhausted:
            assert self.scheduler.num_waiting == LIMITS.max_waiting

    @precondition(lambda self: len(self.plans) < 2)
    @rule()
    def plan(self) -> None:
        oldest = self._oldest_running()
        before = oldest.num_scheduled if oldest else 0
        self.scheduler.plan()
        self._apply_messages()
        self._take_events()
        if oldest is not None and not any(
            prompt.arrival < oldest.arrival and prompt.num_remaining for prompt in self.prompts if prompt.row >= 0
        ):
            expected = min(LIMITS.reserved_tokens(BLOCK_SIZE), oldest.num_tokens - before)
            assert oldest.num_scheduled - before >= expected

    @precondition(lambda self: self.plans)
    @rule()
    def complete(self) -> None:
        self.scheduler.complete(answer(self.plans.popleft()))
        self._take_events()

    @precondition(lambda self: self.prompts)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        prompt = data.draw(st.sampled_from(self.prompts))
        self.scheduler.release(prompt)
        self.prompts.remove(prompt)
        self._apply_messages()

    @precondition(lambda self: any(prompt.blocks for prompt in self.prompts))
    @rule(data=st.data())
    def begin_read(self, data: st.DataObject) -> None:
        prompt = data.draw(st.sampled_from([prompt for prompt in self.prompts if prompt.blocks]))
        self.scheduler.begin_read(prompt)
        self.readers.append(prompt)

    @precondition(lambda self: self.readers)
    @rule()
    def end_read(self) -> None:
        prompt = self.readers.pop()
        assert prompt.blocks is not None
        self.scheduler.end_read(prompt)

    @invariant()
    def is_sound(self) -> None:
        self.scheduler.check_integrity()
        stats = self.scheduler.kv.stats()
        assert stats.num_free + stats.num_cached + stats.num_held == 14

    def teardown(self) -> None:
        """Whatever happened: everything that is not given up is computed, and nothing is held in the end."""
        for _ in range(1000):
            if not self.prompts:
                break
            while len(self.plans) < 2 and self.scheduler.plan():
                self._apply_messages()
            self._take_events()
            if self.plans:
                self.complete()
            for prompt in [prompt for prompt in self.prompts if prompt.state is PromptState.COMPUTED]:
                self.scheduler.release(prompt)
                self.prompts.remove(prompt)
            while self.readers:
                self.end_read()
        assert self.prompts == []
        while self.plans:
            self.complete()
        while self.readers:
            self.end_read()
        self.scheduler.check_integrity()
        assert self.scheduler.kv.stats().num_held == 0
        super().teardown()

    def _oldest_running(self) -> Prompt | None:
        running = [prompt for prompt in self.prompts if prompt.state is PromptState.RUNNING and prompt.num_remaining]
        return min(running, key=lambda prompt: prompt.arrival, default=None)

    def _apply_messages(self) -> None:
        for message in self.scheduler.take_messages():
            if isinstance(message, AddRow):
                assert message.row not in self.tables
                self.tables[message.row] = []
            elif isinstance(message, RemoveRow):
                del self.tables[message.row]
                self.rows.pop(message.row, None)
            else:
                assert isinstance(message, StepPlan)
                self._apply_plan(message)

    def _apply_plan(self, plan: StepPlan) -> None:
        assert sum(segment.num_tokens for segment in plan.segments) <= LIMITS.max_step_tokens
        assert len({segment.row for segment in plan.segments}) == len(plan.segments)
        for segment in plan.segments:
            end = segment.position + segment.num_tokens
            # Each token exactly once: a chunk starts where the one before it ended.
            assert segment.position == self.rows.get(segment.row, segment.position)
            assert segment.position % BLOCK_SIZE == 0
            assert segment.sample or end % BLOCK_SIZE == 0
            self.tables[segment.row] += segment.new_block_ids
            assert len(self.tables[segment.row]) * BLOCK_SIZE >= end
            self.rows[segment.row] = end
        self.plans.append(plan)

    def _take_events(self) -> None:
        for event in self.scheduler.take_events():
            if isinstance(event, Scheduled):
                assert event.prompt not in self.ready
                self.ready[event.prompt] = 0
            elif isinstance(event, BlocksReady):
                assert event.first_block == self.ready[event.prompt]
                self.ready[event.prompt] = event.end_block
            elif isinstance(event, FirstTokenSampled):
                assert self.ready[event.prompt] == event.prompt.num_blocks


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(deadline=None, max_examples=60, stateful_step_count=40)
