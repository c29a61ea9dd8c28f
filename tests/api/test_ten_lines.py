"""The lines that docs/api.md begins with work as they are written there."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import tiny

ROOT = Path(__file__).parents[2]


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)


LINES, GIVEN = blocks("docs/api.md")[:2]
REAL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def executed(lines: str, folder: Path) -> dict:
    """The names that the lines leave, with the value of each expression in `told`."""
    experiment = tiny.experiment(folder, output="runs/mine", iterations=1, log__tensorboard=False)
    lines = lines.replace('"my.yaml"', repr(str(experiment)))
    names: dict = {"told": []}
    exec(GIVEN, names)  # noqa: S102 (lines of our own page)
    for line in lines.splitlines():
        if re.match(r"(model\.logps|trainer\.step|selm\.)", line):
            line = f"told.append({line.partition('  #')[0]})"
        exec(line, names)  # noqa: S102
    return names


def check(names: dict) -> None:
    by_role, stepped, ran, metrics = names["told"]
    count = len(names["pairs"])
    assert count and {role: len(values) for role, values in by_role.items()} == {
        role: count for role in ("chosen", "rejected", "explore")
    }
    assert list(stepped)[:2] == ["loss", "grad_norm"], "what a person looks at first"
    assert stepped["loss"] == pytest.approx(0.6931, abs=1e-4)
    assert stepped["grad_norm"] > 0
    assert isinstance(metrics, pd.DataFrame)
    assert (metrics["learning_rate"].dropna() <= 1e-6).all()
    assert len(ran.pairs) and len(ran.answers) and len(ran.heldout)


@pytest.mark.filterwarnings("error::UserWarning")
def test_the_ten_lines_run_on_a_tiny_model(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    # To a rule of words all letters of a random model are alike.
    lines = LINES.replace(REAL, str(folder)).replace('"sentiment"', '"length"')
    check(executed(lines, tmp_path))


@pytest.mark.slow
def test_the_ten_lines_run_as_they_are_written(tmp_path, monkeypatch, real_model):
    assert real_model
    monkeypatch.chdir(tmp_path)
    check(executed(LINES, tmp_path))


def test_the_readme_shows_the_same_lines():
    def meant(code: str) -> str:
        return ast.dump(ast.parse(code))

    assert meant(LINES) in map(meant, blocks("README.md"))


def test_importing_the_package_is_quick_and_loads_no_jax():
    code = (
        "import sys, time; began = time.perf_counter(); import selm_jax as selm\n"
        "seconds = time.perf_counter() - began\n"
        "heavy = {'jax', 'numpy', 'pandas', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert seconds < 0.5, seconds\n"
        "assert set(selm.__all__) <= set(dir(selm)) and 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_is_there_and_described():
    import selm_jax as selm

    for name in selm.__all__:
        assert getattr(selm, name).__doc__, name
    with pytest.raises(AttributeError, match="no attribute 'trainer'"):
        _ = selm.trainer


def test_run_can_be_called_whatever_was_imported_before():
    code = "import selm_jax.run.run, selm_jax as selm; assert callable(selm.run), selm.run"
    subprocess.run([sys.executable, "-c", code], check=True)
