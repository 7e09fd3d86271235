"""Telling apart who was cancelled: a call that a task awaits, or the task itself."""

from __future__ import annotations

import asyncio


def is_being_cancelled() -> bool:
    """Whether the running task has been asked to end, whatever exception it is that it caught."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
