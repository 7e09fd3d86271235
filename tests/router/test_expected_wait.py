"""Under overload nearly all that is admitted is served in time, the rest refused at once, and no capacity lost."""

from __future__ import annotations

from dataclasses import replace

import pytest

from common.errors import ResourceExhausted
from services.router.admission import MAX_RETRY_S, MIN_RETRY_S, AdmissionQueue
from services.router.expected_wait import PACE_MARGIN, Outlook, Service, ServiceTimes, worker_wait_s
from services.router.placement import Candidate, LocalPrefill
from tests.router.overload_model import Model, Shape

DECODE_BOUND = Shape(rate_per_s=80.0)
SHAPES = {
    "decode": DECODE_BOUND,
    "prefill": replace(DECODE_BOUND, prefill_token_s=0.00025, rate_per_s=60.0),
    "both": replace(DECODE_BOUND, prefill_token_s=0.00019, rate_per_s=80.0),
    "places": replace(DECODE_BOUND, max_in_flight=32, rate_per_s=40.0),
    "slow steps": replace(DECODE_BOUND, row_token_s=0.0025, rate_per_s=20.0),
    "slower steps": replace(DECODE_BOUND, decode_token_s=0.02, row_token_s=0.0025, rate_per_s=20.0),
    "long deadline": replace(DECODE_BOUND, deadline_s=30.0),
    "short deadline": replace(DECODE_BOUND, deadline_s=5.0),
}
WARM_UP_S, UNTIL_S = 40.0, 140.0


# Where an output takes half of its time and more without any queue, some are late whatever is done, and where steps
# grow with the rows, fewer rows than there are can be used in time.
BOUNDS = {"short deadline": (0.93, 0.08), "slow steps": (0.65, 0.08), "slower steps": (0.8, 0.05)}


@pytest.mark.parametrize("name", SHAPES)
def test_at_three_times_the_load_what_is_admitted_is_served(name: str) -> None:
    shape = SHAPES[name]
    least_share, most_expired = BOUNDS.get(name, (0.96, 0.015))
    result = Model(shape, seed=1, warm_up_s=WARM_UP_S).run(UNTIL_S)
    assert result.num_in_time > least_share * shape.capacity_per_s * (UNTIL_S - WARM_UP_S)
    assert result.num_expired < most_expired * result.num_admitted
    assert result.num_refused > 0.3 * (result.num_refused + result.num_admitted)
    assert all(MIN_RETRY_S <= hint_s <= MAX_RETRY_S for hint_s in result.hints_s)


def test_without_it_most_would_wait_and_expire() -> None:
    shape = replace(DECODE_BOUND, is_early=False)
    result = Model(shape, seed=1, warm_up_s=WARM_UP_S).run(UNTIL_S)
    assert result.num_expired > 0.5 * result.num_admitted


@pytest.mark.parametrize("share", [0.3, 0.6, 0.85])
def test_nobody_is_refused_below_capacity(share: float) -> None:
    shape = replace(DECODE_BOUND, rate_per_s=share * DECODE_BOUND.capacity_per_s)
    result = Model(shape, seed=2).run(UNTIL_S)
    assert result.num_refused == 0
    assert result.num_expired == 0


def test_a_burst_after_calm_is_taken_as_far_as_it_can_be_served() -> None:
    model = Model(replace(DECODE_BOUND, rate_per_s=3.0), seed=3)
    model.burst(100, at_s=60.0)  # 4 s of work
    result = model.run(100.0)
    assert result.num_refused == 0
    assert result.num_expired == 0
    model = Model(replace(DECODE_BOUND, rate_per_s=3.0), seed=3)
    model.burst(1000, at_s=60.0)
    result = model.run(100.0)
    assert result.num_refused > 700
    assert result.num_expired < 0.1 * result.num_admitted


def test_the_longer_of_two_queues_counts() -> None:
    prefill = Candidate("p", "x", load=999, unit_s=0.001)
    decode = Candidate("d", "x", load=73, num_at_once=64, unit_s=0.05)
    idle = Candidate("e", "x", load=3, num_at_once=64, unit_s=0.05)
    assert worker_wait_s([prefill], [decode], LocalPrefill.NEVER) == pytest.approx(1.0)
    assert worker_wait_s([prefill], [decode], LocalPrefill.ALWAYS) == pytest.approx(0.5)
    assert worker_wait_s([], [decode], LocalPrefill.WHEN_EMPTY) == pytest.approx(0.5)
    assert worker_wait_s([], [decode, idle], LocalPrefill.ALWAYS) == 0.0
    assert worker_wait_s([], [], LocalPrefill.NEVER) == 0.0


def test_the_hint_says_when_it_would_fit() -> None:
    queue = AdmissionQueue(4, 4)
    message = r"about 9\.0 s to wait and 1\.0 s to be served, with 10\.0 s"
    service = Service(alone_s=1.0, now_s=1.0, longest_s=2.0)
    with pytest.raises(ResourceExhausted, match=message) as caught:
        queue.enter(1, 1, Outlook(9.0, service, left_s=10.0))
    assert AdmissionQueue(4, 4, refuses_late=False).enter(1, 1, Outlook(9.0, service, left_s=10.0))
    assert caught.value.retry_after_s == pytest.approx(3.0)
    assert queue.num_in_flight == queue.num_waiting == 0
    assert queue.enter(1, 1, Outlook(5.9, service, left_s=10.0))


def test_whom_nobody_holds_up_is_never_refused() -> None:
    assert Outlook(0.0, Service(60.0, 60.5, 90.0), left_s=10.0).excess_s(0.0) <= 0
    assert Outlook(0.0, Service(2.0, 9.0, 9.0), left_s=10.0).excess_s(0.0) > 0
    assert Outlook(0.0, Service(2.0, 2.0, 4.0), left_s=10.0).excess_s(4.1) > 0


def test_short_outputs_are_expected_to_take_less() -> None:
    service = ServiceTimes()
    assert service.expected(None, 0.0) == Service(0.0, 0.0, 0.0)
    service.served(first_token_s=0.5, decode_s=2.0, num_tokens=20)
    assert service.expected(None, 0.0).now_s == service.expected(999, 0.0).now_s == pytest.approx(2.5)
    assert service.expected(5, 0.0).now_s == pytest.approx(1.0)


def test_outputs_of_all_lengths_need_more_time_than_the_mean_unless_they_are_limited() -> None:
    equal, mixed = ServiceTimes(), ServiceTimes()
    for number in range(100):
        equal.served(0.0, 6.0, 60)
        mixed.served(0.0, *((3.0, 30) if number % 2 else (9.0, 90)))
    assert equal.expected(None, 0.1).longest_s == pytest.approx(PACE_MARGIN * 6.0)
    assert mixed.expected(None, 0.1).now_s == pytest.approx(6.0, rel=0.1)
    assert mixed.expected(None, 0.1).longest_s == pytest.approx(PACE_MARGIN * 12.0, rel=0.1)
    assert mixed.expected(70, 0.1).longest_s == pytest.approx(PACE_MARGIN * 7.0)


def test_outputs_that_are_cut_off_are_not_taken_for_short() -> None:
    service = ServiceTimes()
    service.served(0.0, 6.0, 60)
    service.cut_off(10)
    assert service.expected(None, 0.1).now_s == pytest.approx(6.0)
    for _ in range(100):
        service.cut_off(100)
    assert service.expected(None, 0.1).now_s == pytest.approx(10.0, rel=0.05)


def test_long_steps_are_known_by_short_ones_before() -> None:
    service = ServiceTimes()
    service.served(first_token_s=0.5, decode_s=2.0, num_tokens=20)
    service.expected(None, 0.1)
    slow = service.expected(None, 0.4)
    assert slow.alone_s == pytest.approx(2.5)
    assert slow.now_s == pytest.approx(8.5)
    for _ in range(5000):
        service.served(first_token_s=0.5, decode_s=8.0, num_tokens=20)
    assert service.expected(None, 0.4).alone_s == pytest.approx(8.5, rel=0.01)  # the machine is slower now


def test_after_a_crowd_has_left_nobody_is_refused_for_its_pace() -> None:
    """Nothing would ever be served again that could tell of another one."""
    service = ServiceTimes()
    service.expected(None, 0.01)
    for _ in range(100):
        service.expected(None, 0.1)
        service.served(first_token_s=0.2, decode_s=10.0, num_tokens=100)
    assert Outlook(0.0, service.expected(None, 0.1), left_s=12.0).excess_s(0.0) > 0
    idle = service.expected(None, 0.0)
    assert idle.now_s == idle.alone_s
    assert Outlook(0.0, idle, left_s=12.0).excess_s(0.0) <= 0
