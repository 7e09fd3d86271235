"""Who gets a row and blocks: all of a prompt's blocks or none. Pure; the order of asking is the scheduler's.

Two rules keep long prompts (more tokens to compute than one step has) and short ones out of each other's way:
  * Long ones hold at most half of the rows and half of the blocks, unless there is only one.
  * Once the prompt at the head of the queue is refused for want of rows or blocks, at most `max_overtakes` others
    are admitted before it; while it is refused because other long ones run, no long one passes it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Literal

from common.kvcache.kv_cache_manager import KVCacheManager
from services.prefill.request import Prompt

Policy = Literal["shortest-remaining", "first-come"]


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Bounds of the scheduler. `max_step_tokens` is at least two blocks."""

    max_rows: int
    max_step_tokens: int
    max_waiting: int  # prompts in the queue
    policy: Policy = "shortest-remaining"
    oldest_share: float = 0.25  # of a step's tokens, for the oldest prompt
    max_overtakes: int = 32

    def reserved_tokens(self, block_size: int) -> int:
        """Tokens of each step that the oldest prompt gets, in whole blocks."""
        return max(1, int(self.max_step_tokens * self.oldest_share) // block_size) * block_size


class Refusal(enum.Enum):
    """Why a prompt was not admitted."""

    NO_ROOM = "no row or too few blocks"
    LONG = "other long prompts hold their share"
    OVERTAKES = "it may not pass the head of the queue"


class Admission:
    """Rows and blocks. The blocks are those of `kv`, which nobody else uses."""

    def __init__(self, kv: KVCacheManager, limits: SchedulerLimits) -> None:
        self._kv = kv
        self._limits = limits
        self.free_rows = list(range(limits.max_rows - 1, -1, -1))
        self._num_long = 0  # long prompts that hold blocks
        self._num_long_blocks = 0
        self._head_refusal: Refusal | None = None  # in this step
        self._num_overtakes = 0  # of the head of the queue

    def begin_step(self) -> None:
        """The head of the queue, if it is asked for first in this step, was not refused yet."""
        self._head_refusal = None

    def admit(self, prompt: Prompt, is_head: bool) -> Refusal | None:
        """Give a waiting prompt its row and blocks and return None, or say why not and change nothing of it."""
        refusal = self._refusal_of_pass() if not is_head else None
        refusal = refusal or self._take(prompt, is_head)
        if is_head:
            self._head_refusal = refusal
            self._num_overtakes = self._num_overtakes if refusal else 0
        elif refusal is None and self._head_refusal is Refusal.NO_ROOM:
            self._num_overtakes += 1
        return refusal

    def forget_head(self) -> None:
        """The head of the queue left without being admitted."""
        self._head_refusal = None
        self._num_overtakes = 0

    def return_row(self, prompt: Prompt) -> None:
        self.free_rows.append(prompt.row)
        prompt.row = -1

    def return_blocks(self, prompt: Prompt) -> None:
        assert prompt.blocks is not None
        self._kv.release(prompt.blocks)
        prompt.blocks = None
        if prompt.is_long:
            self._num_long -= 1
            self._num_long_blocks -= prompt.num_blocks

    def _refusal_of_pass(self) -> Refusal | None:
        if self._head_refusal is None:
            return None
        if self._limits.policy == "first-come" or self._num_overtakes >= self._limits.max_overtakes:
            return Refusal.OVERTAKES
        return None

    def _take(self, prompt: Prompt, is_head: bool) -> Refusal | None:
        num_matched = self._kv.match_prefix(prompt.block_hashes)
        if not self.free_rows or prompt.num_blocks - num_matched > self._kv.num_available:
            return Refusal.NO_ROOM
        max_cached = (prompt.num_tokens - 1) // self._kv.block_size
        blocks = self._kv.admit(prompt.block_hashes, max_cached)
        num_cached = blocks.num_cached_blocks * self._kv.block_size
        is_long = prompt.num_tokens - num_cached > self._limits.max_step_tokens
        refusal = self._refusal_of_long(prompt, is_head) if is_long else None
        if refusal is None and not self._kv.extend(blocks, prompt.num_blocks):
            refusal = Refusal.NO_ROOM
        if refusal is not None:
            self._kv.release(blocks)
            return refusal
        prompt.row, prompt.blocks, prompt.is_long = self.free_rows.pop(), blocks, is_long
        prompt.num_cached = prompt.num_scheduled = prompt.num_computed = num_cached
        self._num_long += is_long
        self._num_long_blocks += prompt.num_blocks * is_long
        return None

    def _refusal_of_long(self, prompt: Prompt, is_head: bool) -> Refusal | None:
        if self._limits.policy == "first-come":
            return None
        if not is_head and self._head_refusal is Refusal.LONG:
            return Refusal.LONG
        if self._num_long == 0:
            return None
        too_many = self._num_long >= max(1, self._limits.max_rows // 2)
        too_large = self._num_long_blocks + prompt.num_blocks > self._kv.num_blocks // 2
        return Refusal.LONG if too_many or too_large else None
