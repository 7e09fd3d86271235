"""Length distributions have the moments and bounds that they say, and a wrong one is refused by the flag's name."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import InvalidArgument
from loadtest.lengths import Fixed, LogNormal, Uniform, parse_lengths


def test_forms_are_told_apart() -> None:
    assert parse_lengths("--input-tokens", "512") == Fixed(512)
    assert parse_lengths("--input-tokens", "uniform:10:200") == Uniform(10, 200)
    assert parse_lengths("--input-tokens", "lognormal:1000:1.5") == LogNormal(1000, 1.5)


@pytest.mark.parametrize(
    "text",
    ["", "0", "-4", "4.5", "many", "uniform:10", "uniform:20:10", "uniform:0:3", "normal:3:4", "lognormal:0.5:1"],
)
def test_what_is_no_length_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        parse_lengths("--input-tokens", text)
    assert refused.value.field == "--input-tokens"
    assert refused.value.value == repr(text)


def test_uniform_reaches_both_ends_and_no_further() -> None:
    drawn = Uniform(3, 6).draw_tokens(np.random.default_rng(0), 500)
    assert set(drawn) == {3, 4, 5, 6}


def test_lognormal_has_the_mean_and_the_variation_asked_for() -> None:
    drawn = np.array(LogNormal(800, 0.8).draw_tokens(np.random.default_rng(0), 40_000))
    assert drawn.mean() == pytest.approx(800, rel=0.02)
    assert drawn.std() / drawn.mean() == pytest.approx(0.8, rel=0.05)
    assert LogNormal(1, 3.0).draw_tokens(np.random.default_rng(0), 1000).count(0) == 0


def test_only_a_lognormal_has_no_largest_length() -> None:
    assert Fixed(7).largest_tokens == 7
    assert Uniform(3, 6).largest_tokens == 6
    assert LogNormal(100, 1).largest_tokens is None
