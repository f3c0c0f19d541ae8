"""The pico Llama checkpoints of tests/support/checkpoints.py as fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support import checkpoints


@pytest.fixture(scope="session")
def write_checkpoint() -> Callable[..., Path]:
    return checkpoints.write_checkpoint


@pytest.fixture(scope="session")
def llama_family() -> Callable[..., list[Path]]:
    return checkpoints.llama_family
