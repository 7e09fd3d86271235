"""What the scheduler keeps of one sequence, and the events by which it tells the rest what became of it.

Plain values: knows neither gRPC nor asyncio nor tensors.
"""

from __future__ import annotations

import enum
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from common.deadline import Deadline
from common.kvcache.kv_cache_manager import SequenceBlocks
from common.worker.sequence import SequenceRequest
from common.worker.step_plan import AddRow

Key = tuple[str, int]  # (session, sequence id): sequence ids are unique within a router process only


class SequenceState(enum.Enum):
    """Drawn in `scheduler`."""

    OPEN = enum.auto()
    RECEIVING = enum.auto()
    READY = enum.auto()
    RUNNING = enum.auto()
    GONE = enum.auto()


class End(enum.Enum):
    """How a sequence left. `CLOSED`: whoever owned it said so, and is not told."""

    FINISHED = "finished"
    PREEMPTED = "preempted"
    LOST = "lost"
    DEADLINE = "deadline"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(slots=True, eq=False)
class DecodeSequence:
    """One sequence. Read it freely; only the scheduler changes it.

    token_ids   prompt │ output of other workers │ first token │ tokens of steps
    KV in place ├─ handed off, or computed here ─┼─ one more with each step that is done ─▶

    The first token comes with the hand-off, or from the last chunk of a sequence that is computed here (`is_local`).
    """

    session_id: str
    request: SequenceRequest
    ticket_id: int
    serial: int  # order of Open: the larger, the younger
    blocks: SequenceBlocks
    hashes: list[bytes]  # of the full blocks known so far
    num_handoff_blocks: int  # blocks of everything before the first token
    token_ids: array[int]  # "I"
    is_local: bool = False  # its prompt is computed here, nothing is handed off
    num_chunked: int = 0  # leading tokens that are in place, or in chunks that were planned
    num_computed: int = 0  # leading tokens, up to the first token, whose KV is in place
    state: SequenceState = SequenceState.OPEN
    row: int = -1
    num_blocks_sent: int = 0  # leading blocks that the ranks know of
    num_planned: int = 0  # steps that were planned
    num_stepped: int = 0  # steps whose token was taken
    num_holds: int = 0  # plans and transfers under way that may touch the blocks
    verified: set[int] = field(default_factory=set)  # verified blocks beyond the leading run
    num_verified: int = 0  # leading blocks that are in place
    num_final: int = 0  # leading blocks of which prefill said that their computation was right
    is_announced: bool = False  # its router was told that its first step begins
    opened_s: float = 0.0
    scheduled_s: float = 0.0  # first chunk of a local sequence
    joined_s: float = 0.0
    first_step_s: float = 0.0
    last_token_s: float = 0.0

    @property
    def key(self) -> Key:
        return (self.session_id, self.request.sequence_id)

    @property
    def num_handoff_tokens(self) -> int:
        return len(self.request.token_ids)

    @property
    def num_unplanned_tokens(self) -> int:
        """Tokens of a local sequence that are in no chunk yet; 0 once decode steps may be planned."""
        return self.num_handoff_tokens - self.num_chunked

    @property
    def max_steps(self) -> int:
        """Tokens of decode steps: the first came before them, others perhaps from other workers."""
        return self.request.sampling.max_tokens - self.request.num_output_tokens - 1

    @property
    def wants_step(self) -> bool:
        """Whether a decode step may be planned: the token before it was sampled, or will be by a plan in flight."""
        return self.num_unplanned_tokens == 0 and self.num_planned < self.max_steps

    def end_when_closed(self, now_s: float) -> End:
        """How it ended if its owner closes it now, who may be so early because the time is up by his clock."""
        deadline = Deadline(self.request.deadline_s, self.request.deadline_s - self.opened_s)
        return End.DEADLINE if deadline.explains_end(now_s) else End.CLOSED

    def prompt_computed(self, block_size: int) -> PromptComputed:
        """The event that goes before a local sequence's first token."""
        queue_s, prefill_s = self.scheduled_s - self.opened_s, self.joined_s - self.scheduled_s
        num_cached_tokens = self.blocks.num_cached_blocks * block_size
        return PromptComputed(self.key, round(queue_s * 1e9), round(prefill_s * 1e9), num_cached_tokens)

    def add_row(self) -> AddRow:
        """The message that gives the sequence its row on the ranks."""
        num_prompt = self.request.num_prompt_tokens
        prompt, output = self.token_ids[:num_prompt], self.token_ids[num_prompt:]
        return AddRow(self.row, self.request.sampling, prompt.tobytes(), output.tobytes())

    def ended(self, end: End, finish_reason: int, error: str) -> SequenceEnded:
        """The last event of the sequence."""
        queue_s = self.first_step_s - self.joined_s if self.first_step_s else 0.0
        decode_s = self.last_token_s - self.first_step_s
        return SequenceEnded(
            self.key, self.ticket_id, end, finish_reason, error, round(queue_s * 1e9), round(decode_s * 1e9)
        )


@dataclass(frozen=True, slots=True)
class TokenSampled:
    """The next token of a sequence. `position` counts the whole output, from 0."""

    key: Key
    position: int
    token_id: int
    logprob: float | None
    top_logprobs: Sequence[tuple[int, float]]


@dataclass(frozen=True, slots=True)
class PromptComputed:
    """The prompt of a local sequence is in place; its first token follows."""

    key: Key
    queue_ns: int
    prefill_ns: int
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class StepsBegin:
    """The first decode step of a sequence that was handed off begins: its second token is one step away."""

    key: Key


@dataclass(frozen=True, slots=True)
class SequenceEnded:
    """The sequence left; its last event. `finish_reason` is a value of the proto's enum, 0 unless FINISHED."""

    key: Key
    ticket_id: int
    end: End
    finish_reason: int
    error: str
    decode_queue_ns: int
    decode_ns: int


@dataclass(frozen=True, slots=True)
class BlocksReserved:
    """All blocks that the hand-off fills belong to the sequence."""

    ticket_id: int


RouterEvent = TokenSampled | PromptComputed | StepsBegin | SequenceEnded  # what a sequence's router is told
Event = RouterEvent | BlocksReserved


def blocks_of(seq: DecodeSequence, first_block: int, num_blocks: int) -> Sequence[int]:
    """Ids of a run of a sequence's blocks."""
    return seq.blocks.block_ids[first_block : first_block + num_blocks]
