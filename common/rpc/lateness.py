"""What ends a call at its deadline is `DeadlineExceeded`, whoever noticed first. Knows no service."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

from common.deadline import Deadline
from common.errors import Cancelled, DeadlineExceeded
from common.rpc.status import find_baton_error


@contextlib.contextmanager
def late_not_cancelled(deadline: Deadline) -> Iterator[None]:
    """Raise `DeadlineExceeded` for a cancellation that the deadline explains; gRPC may have been the first to know."""
    try:
        yield
    except (asyncio.CancelledError, Exception) as error:
        is_cancelled = isinstance(error, asyncio.CancelledError) or isinstance(find_baton_error(error), Cancelled)
        if is_cancelled and deadline.explains_end(time.monotonic()):
            raise DeadlineExceeded(f"not done within {deadline.timeout_s:.3f} s") from error
        raise
