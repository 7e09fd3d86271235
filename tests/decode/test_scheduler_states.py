"""Random lives of sequences against ranks that check every block they read: see FakeRanks."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from common.errors import InvalidArgument, ResourceExhausted
from common.kvcache.kv_cache_manager import KVCacheManager
from services.decode.plans import MAX_PLANS_IN_FLIGHT
from services.decode.request import DecodeSequence, End, Key, SequenceEnded, SequenceState, TokenSampled, blocks_of
from services.decode.scheduler import DecodeScheduler
from tests.decode.fake_ranks import FakeRanks
from tests.decode.requests import make_request, token_of

BLOCK_SIZE = 2
MAX_OPEN = 6


@dataclass(frozen=True, slots=True)
class Arrival:
    """A sequence that a router opens."""

    router: str
    prompt: list[int]
    num_output: int
    max_tokens: int
    seed: int
    patience_s: int
    is_local: bool = False


arrivals = st.builds(
    Arrival,
    router=st.sampled_from("ab"),
    prompt=st.lists(st.integers(1, 2), min_size=1, max_size=9),
    num_output=st.integers(0, 2),
    max_tokens=st.integers(3, 14),
    seed=st.integers(0, 5),
    patience_s=st.integers(5, 400),
    is_local=st.booleans(),
)


class SchedulerMachine(RuleBasedStateMachine):
    """A router, prefill workers and ranks that do everything in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.now_s = 0.0
        self.opened: dict[Key, DecodeSequence] = {}
        self.ended: dict[Key, End] = {}
        self.outputs: dict[Key, list[int]] = defaultdict(list)
        self.transfers: list[tuple[DecodeSequence, int, int]] = []

    @initialize(num_blocks=st.integers(3, 16), max_rows=st.integers(1, 3), chunk_tokens=st.integers(1, 6))
    def start(self, num_blocks: int, max_rows: int, chunk_tokens: int) -> None:
        self.num_blocks = num_blocks
        self.ranks = FakeRanks(num_blocks, BLOCK_SIZE)
        self.scheduler = DecodeScheduler(
            lambda: KVCacheManager(num_blocks, BLOCK_SIZE), max_rows, MAX_OPEN, b"model", chunk_tokens
        )
        self.chunk_tokens = chunk_tokens

    def live(self, *states: SequenceState) -> list[DecodeSequence]:
        """Those that may be handed off."""
        return [seq for seq in self.opened.values() if seq.state in states and not seq.is_local]

    @rule(arrival=arrivals)
    def open(self, arrival: Arrival) -> None:
        self._open(arrival)

    @rule(several=st.lists(arrivals, min_size=1, max_size=4))
    def arrive(self, several: list[Arrival]) -> None:
        """Sequences that are opened and handed off before anything else happens."""
        for arrival in several:
            seq = self._open(arrival)
            if seq is not None and not seq.is_local:
                self._hand_off(seq)

    def _open(self, arrival: Arrival) -> DecodeSequence | None:
        sequence_id = len(self.opened)
        generated = [token_of(arrival.seed, index) for index in range(arrival.num_output)]
        request = make_request(
            sequence_id,
            [*arrival.prompt, *generated],
            num_output=arrival.num_output,
            max_tokens=arrival.max_tokens,
            seed=arrival.seed,
            deadline_s=self.now_s + arrival.patience_s,
        )
        try:
            seq = self.scheduler.open(arrival.router, request, ticket_id=sequence_id, is_local=arrival.is_local)
        except InvalidArgument:
            assert len(arrival.prompt) + arrival.max_tokens - 1 > self.num_blocks * BLOCK_SIZE
            return None
        except ResourceExhausted:
            assert len([seq for seq in self.opened.values() if seq.state is not SequenceState.GONE]) == MAX_OPEN
            return None
        self.opened[seq.key] = seq
        return seq

    @precondition(lambda self: self.live(SequenceState.OPEN))
    @rule(data=st.data())
    def reserve(self, data: st.DataObject) -> None:
        self.scheduler.reserve(data.draw(st.sampled_from(self.live(SequenceState.OPEN))))

    @precondition(lambda self: self.live(SequenceState.RECEIVING))
    @rule(data=st.data(), size=st.integers(1, 3))
    def begin_transfer(self, data: st.DataObject, size: int) -> None:
        seq = data.draw(st.sampled_from(self.live(SequenceState.RECEIVING)))
        begun = [first + count for owner, first, count in self.transfers if owner is seq]
        first = max([seq.num_verified, *begun])
        if first < seq.num_handoff_blocks:
            self.scheduler.hold(seq)
            self.transfers.append((seq, first, min(size, seq.num_handoff_blocks - first)))

    @precondition(lambda self: self.transfers)
    @rule(data=st.data(), arrives=st.booleans())
    def end_transfer(self, data: st.DataObject, arrives: bool) -> None:
        transfer = data.draw(st.sampled_from(self.transfers))
        self.transfers.remove(transfer)
        seq, first, count = transfer
        if arrives and self.ended.get(seq.key) is not End.LOST:
            # It may still write when the sequence is gone: until the hold ends, the blocks are its own.
            self.ranks.write(blocks_of(seq, first, count), first, seq.request.token_ids)
            self.scheduler.verify(seq, range(first, first + count))
        elif not arrives:
            self.transfers = [other for other in self.transfers if not (other[0] is seq and self._give_back(other))]
        self.scheduler.release_hold(seq)

    def _give_back(self, transfer: tuple[DecodeSequence, int, int]) -> bool:
        self.scheduler.release_hold(transfer[0])
        return True

    @precondition(lambda self: self.live(SequenceState.OPEN, SequenceState.RECEIVING))
    @rule(data=st.data())
    def finalize(self, data: st.DataObject) -> None:
        """Prefill says of some blocks, here or not, that they were computed right."""
        seq = data.draw(st.sampled_from(self.live(SequenceState.OPEN, SequenceState.RECEIVING)))
        self.scheduler.finalize(seq, data.draw(st.integers(0, seq.num_handoff_blocks)))

    @precondition(lambda self: self.live(SequenceState.RECEIVING))
    @rule(data=st.data())
    def join(self, data: st.DataObject) -> None:
        self._join(data.draw(st.sampled_from(self.live(SequenceState.RECEIVING))))

    def _join(self, seq: DecodeSequence) -> None:
        if seq.num_verified == seq.num_handoff_blocks:
            first = token_of(seq.request.sampling.seed, seq.request.num_output_tokens)
            self.scheduler.finalize(seq, seq.num_handoff_blocks)
            self.scheduler.join(seq, first, self.now_s)

    @precondition(lambda self: self.live(SequenceState.OPEN, SequenceState.RECEIVING))
    @rule(data=st.data())
    def hand_off(self, data: st.DataObject) -> None:
        """All of it at once, as far as there are blocks."""
        self._hand_off(data.draw(st.sampled_from(self.live(SequenceState.OPEN, SequenceState.RECEIVING))))

    def _hand_off(self, seq: DecodeSequence) -> None:
        in_flight = [transfer for transfer in self.transfers if transfer[0] is seq]
        if in_flight or not (seq.state is SequenceState.RECEIVING or self.scheduler.reserve(seq)):
            return
        first, count = seq.num_verified, seq.num_handoff_blocks - seq.num_verified
        self.ranks.write(blocks_of(seq, first, count), first, seq.request.token_ids)
        self.scheduler.verify(seq, range(first, first + count))
        self._join(seq)

    @rule()
    def plan(self) -> None:
        plan = self.scheduler.plan(self.now_s)
        self.ranks.submit(plan.messages)
        if plan.step is not None:
            self.ranks.submit([plan.step])
            assert len({segment.row for segment in plan.step.segments}) == len(plan.step.segments)
            chunked = [segment.num_tokens for segment in plan.step.segments if segment.token_ids is not None]
            assert sum(chunked) <= self.chunk_tokens
        assert self.scheduler.num_plans_in_flight <= MAX_PLANS_IN_FLIGHT

    @precondition(lambda self: self.scheduler.num_plans_in_flight)
    @rule(failing_rows=st.sampled_from([0] * 9 + [1]))
    def complete(self, failing_rows: int) -> None:
        self.scheduler.complete(self.ranks.run_next(failing_rows), self.now_s)

    @rule(num_steps=st.integers(1, 6))
    def run_steps(self, num_steps: int) -> None:
        """As the engine does: one plan ahead."""
        for _ in range(num_steps):
            self.plan()
            self.plan()
            if self.scheduler.num_plans_in_flight:
                self.complete(0)

    @precondition(lambda self: len(self.opened) > len(self.ended))
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from([key for key in self.opened if key not in self.ended]))
        assert self.scheduler.close(key)
        assert not self.scheduler.close(key)

    @rule(router=st.sampled_from("abcdefgh"))
    def break_session(self, router: str) -> None:
        self.scheduler.close_session(router)

    @rule(seconds=st.integers(1, 9))
    def let_time_pass(self, seconds: int) -> None:
        self.now_s += seconds
        self.scheduler.expire(self.now_s)

    @rule(sure=st.integers(0, 15))
    def lose_ranks(self, sure: int) -> None:
        if sure == 0:
            self.scheduler.lose_all()
            self.ranks = FakeRanks(self.num_blocks, BLOCK_SIZE)

    @invariant()
    def events_tell_each_story_once(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for event in self.scheduler.take_events():
            if isinstance(event, TokenSampled):
                assert event.key not in self.ended, "a token after the end"
                request = self.opened[event.key].request
                output = self.outputs[event.key]
                assert event.position == self._first_position(event.key) + len(output)
                assert event.token_id == token_of(request.sampling.seed, event.position)
                output.append(event.token_id)
            elif isinstance(event, SequenceEnded):
                assert event.key not in self.ended, "a second end"
                self.ended[event.key] = event.end
                self._check_end(event)
        for key, seq in self.opened.items():
            assert (seq.state is SequenceState.GONE) == (key in self.ended)

    def _first_position(self, key: Key) -> int:
        """Of the first token that comes from here: of a sequence that is handed off, prefill sent one before."""
        seq = self.opened[key]
        return seq.request.num_output_tokens + (not seq.is_local)

    def _check_end(self, event: SequenceEnded) -> None:
        seq = self.opened[event.key]
        num_output = self._first_position(event.key) + len(self.outputs[event.key])
        is_complete = num_output == seq.request.sampling.max_tokens or seq.token_ids[-1] == 0
        if event.end is End.FINISHED:
            assert is_complete
            assert event.finish_reason

    @invariant()
    def blocks_add_up(self) -> None:
        if hasattr(self, "scheduler"):
            self.scheduler.check_integrity()
            stats = self.scheduler.kv_stats()
            assert stats.num_free + stats.num_cached + stats.num_held == self.num_blocks

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self._let_finish()
        self.events_tell_each_story_once()
        self.blocks_add_up()
        assert self.ended.keys() == self.opened.keys()
        assert self.scheduler.kv_stats().num_held == 0
        assert self.scheduler.next_deadline_s is None

    def _let_finish(self) -> None:
        """What was joined or is local comes to its end by steps alone; only what was never handed off is closed."""
        for seq, _, _ in self.transfers:
            self.scheduler.release_hold(seq)
        for seq in self.live(SequenceState.OPEN, SequenceState.RECEIVING):
            self.scheduler.close(seq.key)
        for _ in range(200):
            self.plan()
            if self.scheduler.num_plans_in_flight:
                self.complete(0)
            elif self.scheduler.has_events:  # planning preempted somebody: the engine plans again then
                self.events_tell_each_story_once()
            else:
                break
        assert self.scheduler.num_open == 0, "steps alone did not bring every sequence to its end"


SchedulerMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestScheduler = SchedulerMachine.TestCase
