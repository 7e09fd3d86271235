"""Keep Python's garbage collector from holding up tokens, in processes that serve for long.

What is loaded by the time of the call stays, so it is frozen: no collection looks at it again. That leaves the
collector without a measure of what is old, and it would look at all live objects every second or so, for 2 to 17 ms,
in which the tokens of all streams wait. So full collections become rare; young objects are collected as ever.
"""

from __future__ import annotations

import gc
from typing import Final

_YOUNG: Final = 700  # objects made since the last collection of the young; Python's default
_MIDDLE: Final = 10  # of these between collections of what survived one; Python's default, more would take milliseconds
_FULL: Final = 1_000  # of these between full ones: minutes under load


def quiet_collector() -> None:
    """Call once, when the process has loaded what it keeps."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, _MIDDLE, _FULL)
