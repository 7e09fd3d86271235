"""What several test folders share."""

from __future__ import annotations

import os
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


@pytest.fixture(scope="session")
def shipped_model() -> Path:
    """The checkpoint that comes with the project."""
    return DEFAULT_MODEL


@pytest.fixture(scope="session")
def shipped_reference(shipped_model: Path) -> Reference:
    """The shipped checkpoint in transformers."""
    return Reference(shipped_model)
