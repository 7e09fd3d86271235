"""One request's deadline, which several clocks count: its client's, gRPC's at both ends of each call, and ours.

Whichever is first, the others must not make it a cancellation: the server that a client called gives itself a little
less than gRPC does, so that its status is there before gRPC resets the stream, and whoever is cancelled so shortly
before its deadline is cancelled because of it. Pure: the caller knows what time it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_HEADROOM_S: Final = 0.05  # for a status to reach the client
_HEADROOM_SHARE: Final = 0.1  # of short deadlines
_SKEW_S: Final = 0.1  # between two processes' clocks of one deadline: messages under way
_SKEW_SHARE: Final = 0.01  # gRPC rounds what it writes on the wire up to so much

# What calls to workers get beyond the deadline that their request names: they keep that themselves.
CALL_SLACK_S: Final = 2.0


@dataclass(frozen=True, slots=True)
class Deadline:
    """`at_s` is of `time.monotonic()`."""

    at_s: float
    timeout_s: float  # of which it is the end

    @classmethod
    def of_call(cls, remaining_s: float | None, most_s: float, now_s: float) -> Deadline:
        """Of a call with so much time left by gRPC (None: no limit), of which it gets at most `most_s`."""
        timeout_s = most_s
        if remaining_s is not None:
            timeout_s = min(most_s, remaining_s - min(_HEADROOM_S, _HEADROOM_SHARE * remaining_s))
        return cls(now_s + timeout_s, timeout_s)

    def explains_end(self, now_s: float) -> bool:
        """Whether what was cancelled now was so because its time is up, by somebody's clock."""
        return now_s >= self.at_s - _SKEW_S - _SKEW_SHARE * self.timeout_s
