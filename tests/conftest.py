"""What several test folders share."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.up import DEFAULT_MODEL
from tests.integration.reference import Reference


@pytest.fixture(scope="session")
def shipped_model() -> Path:
    """The checkpoint that comes with the project."""
    return DEFAULT_MODEL


@pytest.fixture(scope="session")
def shipped_reference(shipped_model: Path) -> Reference:
    """The shipped checkpoint in transformers."""
    return Reference(shipped_model)
