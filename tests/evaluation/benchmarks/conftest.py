"""Fixtures: a tiny model, and the published data."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from tiny import make_model

from selm_jax.evaluation.model import open_model

SHARED = Path(__file__).parents[4] / "shared" / "data"


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "tiny-model")


@pytest.fixture(scope="session")
def model(model_folder):
    return open_model(str(model_folder), slots=2, console=Console(quiet=True))


@pytest.fixture(scope="session")
def shared() -> Path:
    if not SHARED.is_dir():
        pytest.skip(f"the published annotations and questions are not at {SHARED}")
    return SHARED
