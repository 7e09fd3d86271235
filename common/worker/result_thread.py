"""The thread of a rank that waits for launched steps and sends their results, in order, while the next are launched.

What goes wrong in a step, or in the thread that launches them, is told to the front as `RankFailed` behind the results
of the steps before; then the step channel is ended, so that the other thread stops too.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

import msgspec

from common.worker.model_runner import Pending
from common.worker.rank_messages import RankFailed

_log = logging.getLogger(__name__)
MAX_UNSENT = 64  # steps and what ends them


class ResultThread:
    """Steps in, messages out. The front bounds how many steps are under way."""

    def __init__(
        self, rank: int, sends_results: bool, send: Callable[[msgspec.Struct], None], interrupt: Callable[[], None]
    ) -> None:
        """`send`: to the front, used by this thread alone. `interrupt`: make the launching thread's receive end."""
        self._rank = rank
        self._sends_results = sends_results
        self._send = send
        self._interrupt = interrupt
        self._queue: SimpleQueue[Pending | Exception | None] = SimpleQueue()
        self._failed = False
        self._thread = threading.Thread(target=self._run, name="results", daemon=True)
        self._thread.start()

    def put(self, pending: Pending) -> None:
        """Send the step's result when it is there."""
        assert self._queue.qsize() < MAX_UNSENT, "the front bounds how many steps are under way"
        self._queue.put(pending)

    def fail(self, error: Exception) -> None:
        """Tell the front, behind the results of the steps launched before."""
        self._queue.put(error)

    def close(self) -> bool:
        """Wait until everything has been sent. Returns whether all went well."""
        self._queue.put(None)
        self._thread.join()
        return not self._failed

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if not self._handle(item):
                self._interrupt()
                return

    def _handle(self, item: Pending | Exception) -> bool:
        """Returns whether to go on."""
        try:
            if isinstance(item, Exception):
                raise item
            result = item.result()
            if self._sends_results:
                self._send(result)
        except BrokenPipeError:
            return False
        except Exception as error:  # the process edge: whatever it is, the front must know why this rank ended
            self._failed = True
            _log.error("rank %d failed", self._rank, exc_info=error)
            self._tell(error)
            return False
        return True

    def _tell(self, error: Exception) -> None:
        try:
            self._send(RankFailed(self._rank, type(error).__name__, str(error)))
        except OSError:
            _log.warning("rank %d could not tell its front, which is gone", self._rank)
