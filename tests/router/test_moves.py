"""An output is sent again for as long as there is hope; only workers that die of it, or fail, count against it."""

from __future__ import annotations

import math
import random

import pytest
from baton.v1 import worker_pb2

from common.errors import (
    BatonError,
    Cancelled,
    ConnectionLost,
    FailedPrecondition,
    InternalError,
    PeerLost,
    Preempted,
    RanksLost,
    ResourceExhausted,
    Unavailable,
    WorkerDraining,
)
from services.router.last_seen import LastSeen
from services.router.moves import (
    LAST_BACKOFF_S,
    Failure,
    MoveLimits,
    Moves,
    Patience,
    Reason,
    WorkerLife,
    reason_of,
)
from services.router.placement import FIRST_PENALTY_S, LAST_PENALTY_S, Penalties

LIMITS = MoveLimits(max_worker_losses=3, placement_timeout_s=5.0, migration_timeout_s=60.0)


class Lives:
    """Which life each worker lives now."""

    def __init__(self) -> None:
        self.known: dict[str, WorkerLife] = {}

    def moves(self) -> Moves:
        return Moves(LIMITS, self.known.get, random.Random(1))

    def lost(self, index: int) -> Failure:
        """The connection to a worker breaks, and nobody has heard of it since."""
        return failure(ConnectionLost("gone"), (WorkerLife(f"DECODE {index}", "1", 0),))


def failure(
    cause: BatonError,
    lives: tuple[WorkerLife, ...] = (),
    num_new_tokens: int = 0,
    is_draining: bool = False,
    has_output: bool = True,
) -> Failure:
    return Failure(cause, reason_of(cause, is_draining), lives, has_output, num_new_tokens)


@pytest.mark.parametrize(
    ("cause", "is_draining", "reason"),
    [
        (Preempted("x"), True, Reason.PREEMPTED),
        (WorkerDraining("x"), False, Reason.DRAINED),
        (Cancelled("x"), False, Reason.DRAINED),
        (ConnectionLost("x"), True, Reason.DRAINED),
        (RanksLost("x"), False, Reason.DIED),
        (ConnectionLost("x"), False, Reason.DIED),
        (Unavailable("x"), False, Reason.UNREACHABLE),
        (PeerLost("x"), False, Reason.UNREACHABLE),
        (ResourceExhausted("x"), False, Reason.FULL),
        (InternalError("x"), True, Reason.FAILED),
        (FailedPrecondition("x"), False, Reason.FAILED),
    ],
)
def test_why_an_attempt_failed(cause: BatonError, is_draining: bool, reason: Reason) -> None:
    assert reason_of(cause, is_draining) is reason


@pytest.mark.parametrize(
    ("cause", "is_draining"), [(ConnectionLost("x"), True), (WorkerDraining("x"), False), (Preempted("x"), False)]
)
def test_drains_and_preemptions_never_count(cause: BatonError, is_draining: bool) -> None:
    moves = Lives().moves()
    life = WorkerLife("DECODE d", "1", 0)
    for _ in range(50):
        assert moves.pause_s(failure(cause, (life,), is_draining=is_draining, num_new_tokens=1)) == 0.0
    assert moves.num_deaths == 0


def test_an_output_that_kills_workers_is_given_up() -> None:
    moves, lives = Lives().moves(), Lives()
    pauses = [moves.pause_s(lives.lost(index)) for index in range(4)]
    assert None not in pauses[:3]
    assert pauses[3] is None


def test_a_worker_that_is_connected_to_again_has_not_died() -> None:
    lives = Lives()
    moves = lives.moves()
    for index in range(20):
        worker = index % 5
        assert moves.pause_s(lives.lost(worker)) is not None
        lives.known[f"DECODE {worker}"] = WorkerLife(f"DECODE {worker}", "1", 0)
        assert moves.num_deaths == 0


def test_a_death_is_known_by_the_next_life() -> None:
    lives = Lives()
    moves = lives.moves()
    for worker, cause in (("PREFILL p", ConnectionLost("x")), ("DECODE d", PeerLost("x"))):
        moves.pause_s(failure(cause, (WorkerLife(worker, "1", 0),)))
    assert moves.num_deaths == 1  # who was never reached is not taken for dead
    lives.known["PREFILL p"] = WorkerLife("PREFILL p", "1", 0)
    lives.known["DECODE d"] = WorkerLife("DECODE d", "1", 1)  # its ranks were started anew
    assert moves.num_deaths == 1
    lives.known["PREFILL p"] = WorkerLife("PREFILL p", "2", 0)
    assert moves.num_deaths == 2


@pytest.mark.parametrize("cause", [InternalError("bug"), FailedPrecondition("layout"), RanksLost("gone")])
def test_what_a_living_worker_does_wrong_counts(cause: BatonError) -> None:
    moves = Lives().moves()
    pauses = [moves.pause_s(failure(cause)) for _ in range(4)]
    assert [pause is None for pause in pauses] == [False, False, False, True]


@pytest.mark.parametrize(("has_output", "patience_s"), [(False, 5.0), (True, 60.0)])
def test_moves_back_off_and_last_for_as_long_as_the_output_is_patient(has_output: bool, patience_s: float) -> None:
    moves = Lives().moves()
    pauses: list[float] = []
    # A token with each attempt is prefill's, and no sign that hand-offs work.
    while (pause := moves.pause_s(failure(PeerLost("x"), num_new_tokens=1, has_output=has_output))) is not None:
        pauses.append(pause)
    assert pauses[0] == 0.0
    assert patience_s <= sum(pauses) <= patience_s + LAST_BACKOFF_S
    assert max(pauses[:4]) < max(pauses) <= LAST_BACKOFF_S
    assert len(set(pauses[5:])) > 1, "pauses without jitter"


def test_progress_makes_patient_again() -> None:
    moves = Lives().moves()
    for _ in range(200):
        assert moves.pause_s(failure(PeerLost("x"), has_output=False)) is not None
        assert moves.pause_s(failure(PeerLost("x"), num_new_tokens=2)) == 0.0


def test_a_new_request_that_is_refused_everywhere_is_told_soon() -> None:
    moves = Lives().moves()
    pauses = [moves.pause_s(failure(ResourceExhausted("full"), has_output=False)) for _ in range(4)]
    assert [pause is None for pause in pauses] == [False, False, False, True]


def test_patience_lasts_while_a_worker_is_on_its_way() -> None:
    patience = Patience(5.0, now_s=0.0)
    assert patience.until_s(1.0, math.inf) == math.inf
    assert patience.until_s(300.0, 310.0) == 310.0  # it is gone, and was ready a while ago
    assert patience.until_s(310.0, 310.0) is None
    patience = Patience(5.0, now_s=0.0)
    assert patience.until_s(4.0, math.inf) == math.inf
    assert patience.until_s(6.0, -math.inf) == 9.0  # it stands and is no candidate yet
    assert patience.until_s(9.0, -math.inf) is None
    assert Patience(5.0, now_s=0.0).until_s(0.0, -math.inf) == 5.0


def status(state: worker_pb2.WorkerState.ValueType, incarnation: str = "1") -> worker_pb2.WorkerStatus:
    return worker_pb2.WorkerStatus(state=state, incarnation=incarnation, max_sequence_tokens=100)


def test_a_worker_that_was_ready_counts_as_coming_back_for_a_while() -> None:
    seen = LastSeen()
    assert seen.starts_until_s(1, 60.0) == -math.inf  # never heard of
    seen.note(status(worker_pb2.WORKER_STATE_READY), 10.0)
    assert seen.starts_until_s(1, 60.0) == -math.inf
    seen.note(None, 20.0)
    seen.note(None, 30.0)  # each attempt to connect says so
    assert seen.starts_until_s(100, 60.0) == 80.0
    assert seen.starts_until_s(101, 60.0) == -math.inf  # it is too small
    assert seen.life("d") is None
    seen.note(status(worker_pb2.WORKER_STATE_STARTING, "2"), 40.0)
    assert seen.starts_until_s(1, 60.0) == math.inf
    assert seen.life("d") == WorkerLife("d", "2", 0)


def test_a_drain_is_remembered_when_the_worker_is_gone() -> None:
    seen = LastSeen()
    seen.note(status(worker_pb2.WORKER_STATE_READY), 10.0)
    seen.note(status(worker_pb2.WORKER_STATE_DRAINING), 20.0)
    seen.note(None, 50.0)
    assert seen.is_draining
    assert seen.starts_until_s(1, 60.0) == 80.0
    seen.note(status(worker_pb2.WORKER_STATE_READY, "2"), 60.0)
    assert not seen.is_draining


def test_penalties_double_and_end_with_the_first_success() -> None:
    penalties, now_s, lengths = Penalties(), 0.0, []
    for _ in range(8):
        penalties.blame("d", now_s)
        penalties.blame("d", now_s)  # another one that was under way
        begin_s = now_s
        while penalties.active(now_s):
            now_s += FIRST_PENALTY_S / 2
        lengths.append(now_s - begin_s)
    assert lengths == [1.0, 2.0, 4.0, 8.0, *[LAST_PENALTY_S] * 4]
    penalties.forgive("d")
    penalties.blame("d", now_s)
    assert penalties.active(now_s) == {"d"}
    assert not penalties.active(now_s + FIRST_PENALTY_S)
