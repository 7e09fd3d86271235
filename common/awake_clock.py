"""Time that counts only while this process runs: what to judge the silence of others by.

A process that was stopped, or whose loop was held up, finds every timer due before it has read what came meanwhile; by
this clock hardly any time has passed then. Pure: its owner ticks, and says what time it is.
"""

from __future__ import annotations

TICK_S = 0.25  # how often owners tick


class AwakeClock:
    """Seconds since the start, of which a pause of the owner counts two ticks at most."""

    def __init__(self, monotonic_s: float) -> None:
        self.now_s = 0.0
        self._last_s = monotonic_s

    def tick(self, monotonic_s: float) -> float:
        """So late is it now, of `time.monotonic()`. Returns `now_s`."""
        self.now_s += min(max(0.0, monotonic_s - self._last_s), 2 * TICK_S)
        self._last_s = monotonic_s
        return self.now_s
