"""The profile of the token path: every stage is timed, and the ids come through."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import token_path


def test_every_stage_is_timed_for_prompts_of_any_length() -> None:
    short, long = token_path.measure(1, 2), token_path.measure(200, 2)
    assert short.keys() == long.keys()
    assert len(long) >= 15
    assert all(us > 0 for us in (*short.values(), *long.values()))


def test_ids_that_change_on_the_way_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_path, "unpack_tokens", lambda packed: np.frombuffer(packed, ">u4"))
    with pytest.raises(AssertionError, match="another prompt"):
        token_path.measure(10, 1)
