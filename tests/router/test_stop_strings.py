"""Stop strings: the answer is that of a search over the whole text, however the text is cut."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import InvalidArgument
from services.router.stop_strings import (
    MAX_STOP_STRING_CHARS,
    MAX_STOP_STRINGS,
    StopStringMatcher,
)

stop_sets = st.lists(st.text("abc", min_size=1, max_size=5), max_size=4).map(tuple)


def run(stops: tuple[str, ...], pieces: list[str]) -> tuple[str, str | None]:
    matcher = StopStringMatcher(stops)
    emitted = ""
    for piece in pieces:
        text, matched = matcher.push(piece)
        emitted += text
        if matched:
            return emitted, matcher.matched
    return emitted + matcher.flush(), None


def search(stops: tuple[str, ...], text: str) -> tuple[str, str | None]:
    found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    return (text[: min(found)[1]], min(found)[2]) if found else (text, None)


@settings(deadline=None, max_examples=500)
@given(stop_sets, st.lists(st.text("abcd", max_size=6), max_size=12))
def test_stream_gives_what_a_search_of_the_whole_text_gives(stops: tuple[str, ...], pieces: list[str]) -> None:
    assert run(stops, pieces) == search(stops, "".join(pieces))


@settings(deadline=None, max_examples=300)
@given(stop_sets, st.text("abcd", max_size=30))
def test_no_more_is_held_back_than_could_begin_a_stop_string(stops: tuple[str, ...], text: str) -> None:
    matcher = StopStringMatcher(stops)
    emitted, matched = matcher.push(text)
    if not matched:
        held = text[len(emitted) :]
        assert held == "" or any(stop.startswith(held) and stop != held for stop in stops)


def test_match_may_span_many_pieces() -> None:
    assert run(("</end>",), list("one < two </en</end> three")) == ("one < two </en", "</end>")


def test_stop_string_complete_first_wins_over_one_that_begins_first() -> None:
    assert run(("abcdef", "cd"), ["abcdef"]) == ("ab", "cd")
    assert run(("abcdef", "cd"), list("abcdef")) == ("ab", "cd")


def test_longer_of_two_that_end_together_wins() -> None:
    assert run(("\n", "\n\nUser:", "r:"), ["Hi", "\n"])[1] == "\n"
    assert run(("r:", "User:"), ["Hi User", ":"]) == ("Hi ", "User:")


def test_nothing_is_given_out_after_a_match() -> None:
    matcher = StopStringMatcher(("x",))
    assert matcher.push("axb") == ("a", True)
    assert matcher.push("more") == ("", True)
    assert matcher.flush() == ""


def test_without_stop_strings_text_passes_through() -> None:
    assert StopStringMatcher(()).push("text") == ("text", False)


@pytest.mark.parametrize("stops", [("",), ("a" * (MAX_STOP_STRING_CHARS + 1),), ("a",) * (MAX_STOP_STRINGS + 1)])
def test_empty_long_or_many_stop_strings_are_refused(stops: tuple[str, ...]) -> None:
    with pytest.raises(InvalidArgument, match="stop"):
        StopStringMatcher(stops)
