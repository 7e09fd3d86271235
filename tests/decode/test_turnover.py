"""What a newcomer waits for a row."""

from __future__ import annotations

import pytest

from services.decode.turnover import RowTurnover


def test_a_rows_time_is_that_of_the_last_few_dozen_sequences() -> None:
    turnover = RowTurnover()
    assert turnover.row_s(4) == 0.0
    turnover.left(2.0)
    turnover.left(4.0)
    assert turnover.row_s(4) == pytest.approx(0.75)
    for _ in range(200):
        turnover.left(8.0)
    assert turnover.row_s(4) == pytest.approx(2.0, rel=0.01)


def test_the_time_of_a_step_is_that_between_results_while_steps_follow_each_other() -> None:
    turnover = RowTurnover()
    assert turnover.step_s == 0.0
    turnover.stepped(10.0, is_busy=True)
    turnover.stepped(10.5, is_busy=False)
    assert turnover.step_s == pytest.approx(0.5)
    turnover.stepped(99.0, is_busy=True)  # nothing ran before it
    turnover.stepped(99.5, is_busy=True)
    assert turnover.step_s == pytest.approx(0.5)
