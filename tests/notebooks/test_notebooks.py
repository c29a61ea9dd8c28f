"""The notebooks run from start to end: on a tiny model, and in a long test on the real one."""

from __future__ import annotations

import os
from pathlib import Path

import nbformat
import pytest
import tiny
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NAMES = ("quickstart", "own_loss")
SMALL = {"RANKER": "length", "ITERATIONS": 1, "TOKENS": 8, "SEEDS": 4, "STEPS": 2}


def read(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def executed(name: str, folder: Path, **changes) -> str:
    """Returns what the notebook shows as text, with other values in its cell of parameters."""
    notebook = read(name)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    known = dict(line.split(" = ", 1) for line in cell.source.splitlines())
    cell.source += "".join(f"\n{key} = {v!r}" for key, v in changes.items() if key in known)
    NotebookClient(notebook, timeout=None, resources={"metadata": {"path": folder}}).execute()
    outputs = [output for c in notebook.cells for output in c.get("outputs", ())]
    plain = [o.get("text") or o.get("data", {}).get("text/plain", "") for o in outputs]
    return "\n".join(plain)


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    """Gives the kernel, which is another process, one CPU device as on a notebook's machine."""
    flags = os.environ["XLA_FLAGS"].split()
    keep = (flag for flag in flags if "device_count" not in flag)
    monkeypatch.setenv("XLA_FLAGS", " ".join(keep))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(each, marks=[] if each == "quickstart" else pytest.mark.long) for each in NAMES],
)
def test_a_notebook_runs_on_a_tiny_model(name, tmp_path):
    model = str(tiny.make_model(tmp_path / "model"))
    shown = executed(name, tmp_path, MODEL=model, **SMALL)
    if name == "quickstart":
        assert "model.safetensors" in shown and "held-out score" in shown
    else:
        assert "two_peaks" in shown and "log-ratio explore" in shown


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_as_it_is(name, tmp_path, real_model):
    assert real_model
    shown = executed(name, tmp_path)
    assert "0.693" in shown, "the first loss is log 2"


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_stored_without_outputs(name):
    """What a machine printed last would change with every run; the first cell installs."""
    notebook = read(name)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not c.outputs and c.execution_count is None for c in codes)
    assert "%pip install" in codes[0].source
