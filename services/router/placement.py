"""Which prefill and which decode worker take a sequence. Pure: candidates in, a pair out.

Two random candidates are compared and the less loaded one is taken, so that routers which see the same slightly old
loads do not all choose the same worker. A pair always has one layout fingerprint.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Candidate:
    """A worker that takes requests. Loads compare only within a role."""

    address: str
    layout_fingerprint: str
    load: int


def place(
    prefills: Sequence[Candidate],
    decodes: Sequence[Candidate],
    rng: random.Random,
    avoid: Collection[str] = (),
    layout_fingerprint: str | None = None,
) -> tuple[Candidate, Candidate] | None:
    """A pair, or None if there is none.

    Workers in `avoid` are taken only where there is no other. `layout_fingerprint` binds a sequence that has output
    already to the model that produced it.
    """
    usable = {c.layout_fingerprint for c in prefills} & {c.layout_fingerprint for c in decodes}
    if layout_fingerprint is not None:
        usable &= {layout_fingerprint}
    decode = _choose([c for c in decodes if c.layout_fingerprint in usable], rng, avoid)
    if decode is None:
        return None
    partners = [c for c in prefills if c.layout_fingerprint == decode.layout_fingerprint]
    prefill = _choose(partners, rng, avoid)
    return None if prefill is None else (prefill, decode)


def _choose(candidates: list[Candidate], rng: random.Random, avoid: Collection[str]) -> Candidate | None:
    if avoid:
        candidates = [c for c in candidates if c.address not in avoid] or candidates
    if len(candidates) <= 1:
        return candidates[0] if candidates else None
    first, second = rng.sample(candidates, 2)
    return first if first.load <= second.load else second
