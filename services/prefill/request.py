"""What the scheduler keeps about one prompt, and what it reports. Values and counters only; no decisions.

tokens of a prompt   0        num_cached        num_computed       num_scheduled          num_tokens
                     │ prefix cache │ results are back │ in plans that run │ not planned yet │
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from common.kvcache.kv_cache_manager import SequenceBlocks
from common.worker.sequence import SequenceRequest
from common.worker.step_plan import SampledToken


class PromptState(enum.Enum):
    """WAITING ──admit──► RUNNING ──last chunk's result──► COMPUTED; from each of them ──release──► RELEASED."""

    WAITING = "waiting"
    RUNNING = "running"
    COMPUTED = "computed"
    RELEASED = "released"


@dataclass(slots=True, eq=False)
class Prompt:
    """One prompt. Read it freely; only the scheduler that made it changes it."""

    request: SequenceRequest
    arrival: int  # counts up over all prompts of the scheduler
    block_hashes: list[bytes]
    num_blocks: int  # that its tokens fill, the last one perhaps partly
    state: PromptState = PromptState.WAITING
    row: int = -1  # while RUNNING
    blocks: SequenceBlocks | None = None  # from admission until they are free again
    num_cached: int = 0
    num_scheduled: int = 0
    num_computed: int = 0
    num_plans_in_flight: int = 0
    num_readers: int = 0  # sends that gather from its blocks
    failed: bool = False  # nothing more is computed or cached of it
    is_long: bool = False  # needed more than one step when it was admitted

    @property
    def num_tokens(self) -> int:
        return len(self.request.token_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens that no plan has yet."""
        return self.num_tokens - self.num_scheduled

    @property
    def is_plannable(self) -> bool:
        """Whether a plan may take more of it, once it runs."""
        return self.num_remaining > 0 and not self.failed


@dataclass(frozen=True, slots=True)
class Scheduled:
    """The first chunk of the prompt was planned. `num_cached_tokens` need no compute."""

    prompt: Prompt
    num_cached_tokens: int


@dataclass(frozen=True, slots=True)
class BlocksUnderWay:
    """The ranks compute the content of blocks [first_block, end_block) of the prompt now, in the step `step_id`."""

    prompt: Prompt
    first_block: int
    end_block: int
    step_id: int


@dataclass(frozen=True, slots=True)
class BlocksReady:
    """Blocks [first_block, end_block) of the prompt hold their final content."""

    prompt: Prompt
    first_block: int
    end_block: int


@dataclass(frozen=True, slots=True)
class FirstTokenSampled:
    """The whole prompt is computed and this token follows it."""

    prompt: Prompt
    token: SampledToken


@dataclass(frozen=True, slots=True)
class PromptFailed:
    """The ranks could not compute or sample it; others in the same step went on."""

    prompt: Prompt
    reason: str


Event = Scheduled | BlocksUnderWay | BlocksReady | FirstTokenSampled | PromptFailed


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens [begin, end) of a prompt, in one plan."""

    prompt: Prompt
    row: int
    begin: int
    end: int

    @property
    def is_last(self) -> bool:
        return self.end == self.prompt.num_tokens

    def blocks(self, block_size: int) -> range:
        """Those that it fills: chunks end at a block's border, or with the prompt."""
        return range(self.begin // block_size, -(-self.end // block_size))


@dataclass(slots=True)
class StepInFlight:
    """A plan that the ranks have and whose result is not back."""

    step_id: int
    chunks: list[Chunk] = field(default_factory=list)
