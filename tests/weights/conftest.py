"""A model of a few kilobytes as a GGUF file, for all tests of this folder."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_gguf import write_tiny


@pytest.fixture(scope="session")
def tiny_gguf() -> Callable[..., Path]:
    return write_tiny
