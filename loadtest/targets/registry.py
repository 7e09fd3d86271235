"""Chooses the implementation of a target by its kind."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from common.errors import InvalidArgument
from loadtest.targets.base import Target, TargetSpec
from loadtest.targets.baton import open_baton
from loadtest.targets.openai import open_openai

KINDS = ("baton", "openai")


def open_target(spec: TargetSpec) -> AbstractAsyncContextManager[Target]:
    """The target, closed when the context ends."""
    if spec.kind == "baton":
        return open_baton(spec)
    if spec.kind == "openai":
        return open_openai(spec)
    raise InvalidArgument("target kind", spec.kind, f"one of {', '.join(KINDS)}")
