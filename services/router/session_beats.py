"""The beats of one session's stream: when the next one is due, and whether the worker has been silent for too long.

    begun ── the first message says that beats are heard ──▶ asked ── beat 1 comes back ──▶ stands
      └── it says nothing of beats: a worker from before there were any, which is never called silent ──▶ stands

A beat goes through the whole stream and back, so that its answer says that each part of it works. So does an Open:
while those that are before a beat are answered, it waits its turn. Pure: times are those of the caller's `AwakeClock`.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from baton.v1 import decode_pb2

INTERVAL_S: Final = 1.0
SILENT_AFTER_S: Final = 3.0  # without an answer, to a beat or to what is before it
BEGIN_TIMEOUT_S: Final = 5.0  # for the first message, connecting included


class SessionBeats:
    """Of one stream, from its begin on."""

    def __init__(self, now_s: float) -> None:
        self._begun_s = now_s
        self._is_begun = False  # the first message is here
        self._are_heard = False
        self._num_sent = 0
        self._num_answered = 0
        self._unanswered_s: deque[float] = deque()  # when they were sent: at most a few, or it is silent
        self._next_s = 0.0
        self._answered_s = now_s  # when a beat or an Open last was

    @property
    def are_answered(self) -> bool:
        """Whether the stream is known to work, as far as the worker can say."""
        return self._is_begun and (self._num_answered > 0 or not self._are_heard)

    def take(self, response: decode_pb2.SessionResponse, now_s: float) -> None:
        """A message came."""
        if response.opened:
            self._answered_s = now_s
        if not self._is_begun:
            self._is_begun = True
            self._are_heard = response.HasField("beat")
            self._next_s = now_s
        while self._num_answered < min(response.beat, self._num_sent):
            self._num_answered += 1
            self._unanswered_s.popleft()
            self._answered_s = now_s

    def next_number(self, now_s: float) -> int:
        """Of the beat that is due now; 0 if none is."""
        if not self._are_heard or now_s < self._next_s:
            return 0
        self._next_s = now_s + INTERVAL_S
        self._num_sent += 1
        self._unanswered_s.append(now_s)
        return self._num_sent

    def is_silent(self, now_s: float) -> bool:
        """Whether the stream is to be given up."""
        if not self._is_begun:
            return now_s - self._begun_s > BEGIN_TIMEOUT_S
        return bool(self._unanswered_s) and now_s - max(self._unanswered_s[0], self._answered_s) > SILENT_AFTER_S

    @property
    def num_sent(self) -> int:
        """Beats so far."""
        return self._num_sent

    def is_passed_over(self, num_beats_before: int) -> bool:
        """Whether a message that was sent after so many beats is not only waiting for its turn: a beat that was sent
        after it is answered, or nobody answers any."""
        return not self._are_heard or self._num_answered > num_beats_before
