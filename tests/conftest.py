"""What several test folders share."""

from __future__ import annotations

import faulthandler
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from cli.up import DEFAULT_MODEL
from tests.integration.reference import Reference

# The same examples every time: a test that fails fails again.
settings.register_profile("deterministic", derandomize=True, database=None, deadline=None)
settings.load_profile("deterministic")

if not torch.cuda.is_available():
    # Without a GPU the Triton kernels run under Triton's interpreter: decided before any of them is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")

LAST_COLLECTION_S = 120.0


def pytest_sessionfinish(exitstatus: int) -> None:
    """The results stand: they are not held back by a destructor of gRPC that waits for ever for a thread of its own, as
    it does now and then in the garbage collection at the very end."""

    def end() -> None:
        faulthandler.dump_traceback(all_threads=True)
        os._exit(int(exitstatus))

    timer = threading.Timer(LAST_COLLECTION_S, end)
    timer.daemon = True
    timer.start()


@pytest.fixture(scope="session")
def shipped_model() -> Path:
    """The checkpoint that comes with the project."""
    return DEFAULT_MODEL


@pytest.fixture(scope="session")
def shipped_reference(shipped_model: Path) -> Reference:
    """The shipped checkpoint in transformers."""
    return Reference(shipped_model)
