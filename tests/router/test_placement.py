"""A pair always fits, failed workers come last, and load is spread."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from services.router.placement import Candidate, place

CANDIDATES = st.lists(
    st.builds(Candidate, st.sampled_from("abcdefgh"), st.sampled_from(["x", "y", "z"]), st.integers(0, 9)),
    max_size=6,
    unique_by=lambda candidate: candidate.address,
)


@settings(deadline=None, max_examples=300)
@given(CANDIDATES, CANDIDATES, st.sets(st.sampled_from("abcdefgh")), st.sampled_from([None, "x"]), st.integers())
def test_a_pair_fits_and_exists_whenever_it_can(
    prefills: list[Candidate], decodes: list[Candidate], avoid: set[str], pinned: str | None, seed: int
) -> None:
    possible = [
        (p, d)
        for p in prefills
        for d in decodes
        if p.layout_fingerprint == d.layout_fingerprint and pinned in (None, p.layout_fingerprint)
    ]
    placed = place(prefills, decodes, random.Random(seed), avoid, pinned)
    if placed is None:
        assert not possible
        return
    assert placed in possible
    if any(decode.address not in avoid for _, decode in possible):
        assert placed[1].address not in avoid


def test_the_same_seed_places_the_same() -> None:
    workers = [Candidate(str(index), "x", 0) for index in range(5)]
    first, second = random.Random(3), random.Random(3)
    assert [place(workers, workers, first) for _ in range(20)] == [place(workers, workers, second) for _ in range(20)]


def test_the_most_loaded_worker_is_never_taken_while_loads_differ() -> None:
    decodes = [Candidate(str(load), "x", load) for load in range(4)]
    prefills = [Candidate("p", "x", 0)]
    rng = random.Random(1)
    taken: Counter[str] = Counter()
    for _ in range(600):
        placed = place(prefills, decodes, rng)
        assert placed is not None
        taken[placed[1].address] += 1
    assert taken["3"] == 0
    assert taken["0"] > taken["1"] > taken["2"] > 0
