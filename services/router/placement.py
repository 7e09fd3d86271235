"""Which prefill and which decode worker take a sequence. Pure: candidates in, a pair out.

Two random candidates are compared and the less loaded one is taken, so that routers which see the same slightly old
loads do not all choose the same worker (power of two choices; Mitzenmacher, 1996). A pair always has one layout
fingerprint. A decode worker may also compute the prompt itself; when it does, `LocalPrefill` says.
"""

from __future__ import annotations

import enum
import itertools
import random
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass

UNLIMITED = sys.maxsize  # tokens
FIRST_PENALTY_S = 1.0
LAST_PENALTY_S = 16.0


class LocalPrefill(enum.Enum):
    """When decode workers compute prompts themselves."""

    NEVER = "never"
    WHEN_EMPTY = "when-empty"  # no prefill worker that fits is ready
    ALWAYS = "always"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that takes requests. Loads compare only within a role."""

    address: str
    layout_fingerprint: str
    load: int
    max_sequence_tokens: int = 0  # what it can hold of one sequence, prompt and output together; 0: it does not say
    num_at_once: int = 0  # of the load, that waits for nothing
    unit_s: float = 0.0  # how long each unit of load beyond it holds up what comes after it
    step_s: float = 0.0  # time between two tokens of those that decode there now

    @property
    def wait_s(self) -> float:
        """How long its queue holds up a sequence that comes now."""
        return max(0, self.load + 1 - self.num_at_once) * self.unit_s

    def holds(self, num_tokens: int) -> bool:
        """Whether a sequence that may become so long fits."""
        return self.max_sequence_tokens == 0 or num_tokens <= self.max_sequence_tokens


class Penalties:
    """Workers that failed lately are asked after all others for a while, which doubles each time until one sequence
    went well there: one that refuses hand-offs is idle, and would attract nearly every request."""

    def __init__(self) -> None:
        self._penalties: dict[str, tuple[int, float]] = {}  # address -> failures since it last went well, until when

    def blame(self, address: str, now_s: float) -> None:
        """It failed. What fails while the penalty lasts was sent there before, or for want of others."""
        num_failures, until_s = self._penalties.get(address, (0, now_s))
        if now_s >= until_s:
            self._forget_old(now_s)
            penalty_s = min(FIRST_PENALTY_S * 2.0 ** min(num_failures, 10), LAST_PENALTY_S)
            self._penalties[address] = (num_failures + 1, now_s + penalty_s)

    def _forget_old(self, now_s: float) -> None:
        for address, (_, until_s) in list(self._penalties.items()):
            if now_s - until_s > LAST_PENALTY_S:
                del self._penalties[address]

    def forgive(self, address: str) -> None:
        """It went well."""
        self._penalties.pop(address, None)

    def active(self, now_s: float) -> set[str]:
        """Who is to be avoided now."""
        return {address for address, (_, until_s) in self._penalties.items() if now_s < until_s}


def capacities(
    prefills: Sequence[Candidate], decodes: Sequence[Candidate], local: LocalPrefill = LocalPrefill.NEVER
) -> list[int]:
    """How many tokens a sequence may have on each pair that could take one, ascending and without repetitions. Workers
    that do not say hold `UNLIMITED`."""
    found: set[int] = set()
    for fingerprint in {c.layout_fingerprint for c in decodes}:
        held = {c.max_sequence_tokens or UNLIMITED for c in decodes if c.layout_fingerprint == fingerprint}
        by_prefill = {c.max_sequence_tokens or UNLIMITED for c in prefills if c.layout_fingerprint == fingerprint}
        if local is not LocalPrefill.NEVER:
            by_prefill = {UNLIMITED}
        found |= {min(pair) for pair in itertools.product(by_prefill, held)}
    return sorted(found)


def place(
    prefills: Sequence[Candidate],
    decodes: Sequence[Candidate],
    rng: random.Random,
    avoid: Collection[str] = (),
    layout_fingerprint: str | None = None,
    local: LocalPrefill = LocalPrefill.NEVER,
) -> tuple[Candidate | None, Candidate] | None:
    """A pair, or None if there is none. Without a prefill worker, decode computes the prompt itself.

    Workers in `avoid` are taken only where there is no other. `layout_fingerprint` binds a sequence that has output
    already to the model that produced it.
    """
    pinned = {layout_fingerprint} if layout_fingerprint is not None else {c.layout_fingerprint for c in decodes}
    paired = pinned & {c.layout_fingerprint for c in prefills} if local is not LocalPrefill.ALWAYS else set()
    usable = paired or (pinned if local is not LocalPrefill.NEVER else set())
    decode = _choose([c for c in decodes if c.layout_fingerprint in usable], rng, avoid)
    if decode is None or not paired:
        return None if decode is None else (None, decode)
    partners = [c for c in prefills if c.layout_fingerprint == decode.layout_fingerprint]
    return _choose(partners, rng, avoid), decode


def _choose(candidates: list[Candidate], rng: random.Random, avoid: Collection[str]) -> Candidate | None:
    if avoid:
        candidates = [c for c in candidates if c.address not in avoid] or candidates
    if len(candidates) <= 1:
        return candidates[0] if candidates else None
    first, second = rng.sample(candidates, 2)
    return first if first.load <= second.load else second
