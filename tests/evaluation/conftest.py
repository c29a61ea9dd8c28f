"""A tiny chat model, and evaluation on one device; what a mesh changes is tested by itself. A judge
that says what a script tells it, over real HTTP."""

from __future__ import annotations

import jax
import pytest
from rich.console import Console
from scripted_judge import Judge
from tiny import make_model

from selm_jax.evaluation.model import Model, open_model
from selm_jax.parallel.mesh import make_mesh


@pytest.fixture(autouse=True, scope="session")
def one_device():
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selm_jax.evaluation.model.make_mesh", lambda sizes: make_mesh(sizes, first))
        yield


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two tiny random chat models of one shape."""
    root = tmp_path_factory.mktemp("models")
    return [make_model(root / name, seed) for name, seed in (("one", 0), ("two", 1))]


@pytest.fixture(scope="session")
def model(folders) -> Model:
    return open_model(str(folders[0]), slots=8, console=Console(quiet=True))


@pytest.fixture
def judge():
    with Judge() as judge:
        yield judge


@pytest.fixture(scope="module")
def local_tasks():
    """lm-eval reads thousands of task files at each start; the local ones will do."""
    from lm_eval.tasks import TaskManager

    from selm_jax.evaluation.benchmarks.lm_eval import tasks

    def manager(folder, _=""):
        return TaskManager(include_path=str(folder), include_defaults=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "manager", manager)
        yield
