"""A decode scheduler and the runner that it plans for, with sequences that join and leave as a worker's do.

A sequence comes as after its hand-off: opened, its blocks reserved, verified and final. From then on the scheduler does
what it does in a worker; its messages go through the codec of the step channel to the runner. Front and rank share a
thread here, so what a worker's front does in a process of its own comes on top of the rank's host time.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable
from typing import Final

import msgspec
import numpy as np

from benchmarks.random_model import BLOCK_SIZE, random_storage
from benchmarks.step_times import Moment, StepTimes
from common.kvcache.kv_cache_manager import KVCacheManager
from common.models.decoder import Decoder
from common.sampling.params import SamplingParams
from common.worker.device_runner import DeviceRunner
from common.worker.device_step import DeviceStep
from common.worker.rank_messages import FrontStepMessage
from common.worker.sequence import SequenceRequest
from common.worker.step_plan import RemoveRow, StepPlan
from services.decode.plans import MAX_PLANS_IN_FLIGHT
from services.decode.request import DecodeSequence
from services.decode.scheduler import DecodeScheduler

SPARE_ROWS: Final = 16  # of sequences whose last step is under way while others have taken their places
NUM_IN_HAND: Final = 4  # sequences that were handed off and wait for a place
FIRST_STEPS: Final = 8  # of a run, not counted
_SESSION: Final = "benchmark"
_MODEL_DIGEST: Final = b"benchmark"
_codec: Final = msgspec.msgpack.Decoder(FrontStepMessage)


class Traffic:
    """`batch` sequences decode at any time, each at `context` tokens half way through its life."""

    def __init__(self, decoder: Decoder, batch: int, context: int, seed: int = 1) -> None:
        self._device, self._vocab_size = decoder.device, decoder.config.vocab_size
        self._batch, self._context = batch, context
        max_rows = batch + SPARE_ROWS
        # Blocks for twice the context: lives differ in length. Those of the dead fill up the prefix cache.
        num_blocks = (max_rows + NUM_IN_HAND) * 2 * (context // BLOCK_SIZE + 1)
        self._runner = DeviceRunner(decoder, random_storage(decoder, num_blocks), max_rows, graph_sizes=(batch,))
        self.scheduler = DecodeScheduler(
            lambda: KVCacheManager(num_blocks, BLOCK_SIZE), max_rows, 2 * max_rows, _MODEL_DIGEST
        )
        self._rng = np.random.default_rng(seed)
        self._in_hand: deque[DecodeSequence] = deque()
        self._decoding: list[DecodeSequence] = []
        self._num_opened = 0
        self._now_s = 0.0

    def steady(self, num_steps: int, life: int) -> StepTimes:
        """Nobody joins or leaves while steps are counted; after `life` steps all sequences are replaced."""
        times = StepTimes()
        while len(times.periods_ms) < num_steps:
            self._decoding = [self._handed_off(life + FIRST_STEPS) for _ in range(self._batch)]
            for seq in self._decoding:
                self._join(seq)
            self._run(life + FIRST_STEPS, times, refill=lambda: 0)
            self._clear()
        return times

    def churning(self, num_steps: int, life: int) -> StepTimes:
        """Each sequence lives `life` steps on average, half of that to one and a half; then another takes its place."""
        assert life >= 2
        times = StepTimes()
        for _ in range(self._batch):
            own = self._drawn_life(life)
            age = int(self._rng.integers(own))
            self._decoding.append(self._handed_off(own, age))
            self._join(self._decoding[-1])
        self._run(num_steps + FIRST_STEPS, times, refill=lambda: self._refill(life))
        self._clear()
        return times

    def _refill(self, life: int) -> int:
        """Before a plan: let sequences take the places of those that want no further step. Returns how many."""
        self._decoding = [seq for seq in self._decoding if seq.wants_step]
        num_joins = self._batch - len(self._decoding)
        for _ in range(num_joins):
            seq = self._in_hand.popleft() if self._in_hand else self._handed_off(self._drawn_life(life))
            self._join(seq)
            self._decoding.append(seq)
        while len(self._in_hand) < NUM_IN_HAND:
            self._in_hand.append(self._handed_off(self._drawn_life(life)))
        return num_joins

    def _drawn_life(self, life: int) -> int:
        return int(self._rng.integers(life - life // 2, life + life // 2 + 1))

    def _run(self, num_steps: int, times: StepTimes, refill: Callable[[], int]) -> None:
        """Steps as a worker takes them: a plan is made when the ranks have fewer than two."""
        moments: list[tuple[Moment, Moment]] = []
        rows, joins = [], []
        under_way: deque[DeviceStep] = deque()
        for _ in range(num_steps):
            joins.append(refill())
            plan = self._send_plan()
            rows.append(len(plan.segments))
            begin = Moment(self._device)
            under_way.append(self._runner.launch(plan))
            moments.append((begin, Moment(self._device)))
            if len(under_way) == MAX_PLANS_IN_FLIGHT:
                self._complete(under_way.popleft())
        while under_way:
            self._complete(under_way.popleft())
        times.add_run(moments, rows, joins, FIRST_STEPS)

    def _send_plan(self) -> StepPlan:
        """Apply what goes before the next step to the runner; returns the step as the rank decodes it."""
        plan = self.scheduler.plan(self._now_s)
        for message in plan.messages:
            received = _codec.decode(msgspec.msgpack.encode(message))
            if isinstance(received, RemoveRow):
                self._runner.remove_row(received.row)
            else:
                self._runner.add_row(received)
        step = _codec.decode(msgspec.msgpack.encode(plan.step))
        assert isinstance(step, StepPlan)
        return step

    def _complete(self, step: DeviceStep) -> None:
        result = step.result()
        assert not any(token.error for token in result.sampled), result
        self._now_s += 0.01
        self.scheduler.complete(result, self._now_s)
        self.scheduler.take_events()

    def _handed_off(self, life: int, age: int = 0) -> DecodeSequence:
        """A sequence whose blocks are all in place, with `life - age` steps to go."""
        length = max(1, self._context - life // 2 + age + int(self._rng.integers(-BLOCK_SIZE // 2, BLOCK_SIZE // 2)))
        self._num_opened += 1
        request = SequenceRequest(
            request_id=f"request-{self._num_opened}",
            sequence_id=self._num_opened,
            token_ids=array("I", self._rng.integers(self._vocab_size, size=length).tolist()),
            num_prompt_tokens=length,
            sampling=SamplingParams(max_tokens=life - age + 1, seed=self._num_opened, temperature=0.0, ignore_eos=True),
            tenant="",
            deadline_s=math.inf,
        )
        seq = self.scheduler.open(_SESSION, request, ticket_id=self._num_opened)
        if not self.scheduler.reserve(seq):
            raise AssertionError(f"no blocks for {length} tokens: {self.scheduler.kv_stats()}")
        self.scheduler.verify(seq, range(seq.num_handoff_blocks))
        self.scheduler.finalize(seq, seq.num_handoff_blocks)
        return seq

    def _join(self, seq: DecodeSequence) -> None:
        self.scheduler.join(seq, first_token_id=1, now_s=self._now_s)

    def _clear(self) -> None:
        """Everybody leaves, and the ranks are told."""
        self.scheduler.close_session(_SESSION)
        self._decoding.clear()
        self._in_hand.clear()
        plan = self.scheduler.plan(self._now_s)
        assert plan.step is None
        for message in plan.messages:
            assert isinstance(message, RemoveRow)
            self._runner.remove_row(message.row)
        self.scheduler.take_events()
        self.scheduler.check_integrity()
        assert self.scheduler.num_open == 0
