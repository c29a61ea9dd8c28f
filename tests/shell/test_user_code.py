"""An experiment names only the user's own functions; verbs that only look never call them."""

import importlib
import sys
from pathlib import Path

import pytest

from selm_jax.feedback import ranker
from selm_jax.feedback.ranker import FeedbackError
from selm_jax.objectives import build as objectives
from selm_jax.objectives.losses import ObjectiveError
from selm_jax.shell.user_code import UserCodeError, function_at

MODULE = """
import functools, os
from os import system
from shutil import rmtree
from pathlib import Path

class Taste:
    def __call__(self, prompt, response, row):
        return 0.0

def good(prompt, response, row):
    return 0.0

tasting = Taste()
partial = functools.partial(good, "p")
"""
NOT_OURS = {
    "os:system": "'os' is part of Python",
    "posix:system": "part of Python",
    "os:popen": "part of Python",  # these four are Python functions, defined where they stand
    "subprocess:getoutput": "part of Python",
    "shutil:rmtree": "part of Python",
    "runpy:run_path": "part of Python",
    "builtins:exec": "part of Python",
    "__main__:main": "part of Python",
    "importlib.util:find_spec": "part of Python",
    "selm_jax.shell.artifacts:remove": "is this program",
    "numpy:save": "installed package",
    "pip._internal:main": "installed package",
    "taste_of_mine:system": "is a builtin_function_or_method; expected a Python function",
    "taste_of_mine:rmtree": "is defined in shutil",
    "taste_of_mine:Taste": "is a type; expected a Python function",
    "taste_of_mine:tasting": "is a Taste; expected a Python function",
    "taste_of_mine:partial": "is a partial; expected a Python function",
    "taste_of_mine:os": "is a module; expected a Python function",
    "taste_of_mine:goood": "has no 'goood'; did you mean 'good'",
    "taste_of_mine:os.system": "expected the form",
}


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "taste_of_mine.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    sys.modules.pop("taste_of_mine", None)


@pytest.mark.parametrize("path", NOT_OURS)
def test_what_is_no_function_of_yours_is_refused_by_all_who_import_by_name(mine, path):
    said = NOT_OURS[path]
    with pytest.raises(UserCodeError, match=said):
        function_at(path)
    with pytest.raises(FeedbackError, match=said):
        ranker.build_ranker(path)
    with pytest.raises(ObjectiveError, match=said):
        objectives.build_objective(path)
    with pytest.raises(ObjectiveError, match=said):
        objectives.build_objective(f"dpo+{path}", beta=0.1)
    with pytest.raises(FeedbackError, match=said):
        ranker.build_ranker("mixture", parts=[{"ranker": path}])


def test_nothing_is_imported_to_refuse_what_is_not_yours(tmp_path):
    before = set(sys.modules)
    for path in ("antigravity:fly", "selm_jax.lab.worlds:random", "sklearn:show_versions"):
        with pytest.raises(UserCodeError):
            function_at(path)
    assert not {"antigravity", "selm_jax.lab.worlds", "sklearn"} & (set(sys.modules) - before)


@pytest.mark.parametrize("requires", [True, False])
def test_an_installed_package_says_that_it_is_for_this_program(tmp_path, monkeypatch, requires):
    place = tmp_path / "site-packages"
    about = place / "our_losses-1.0.dist-info"
    about.mkdir(parents=True)
    (place / "our_losses.py").write_text("def loss():\n    pass\n")
    lines = ["Metadata-Version: 2.1", "Name: our-losses", "Version: 1.0"]
    lines += ["Requires-Dist: selm_jax>=0.1"] if requires else ["Requires-Dist: jax"]
    (about / "METADATA").write_text("\n".join(lines) + "\n")
    (about / "top_level.txt").write_text("our_losses\n")
    monkeypatch.syspath_prepend(place)
    importlib.invalidate_caches()
    try:
        if requires:
            assert function_at("our_losses:loss").__name__ == "loss"
        else:
            with pytest.raises(UserCodeError, match="does not require selm_jax"):
                function_at("our_losses:loss")
            assert "our_losses" not in sys.modules
    finally:
        sys.modules.pop("our_losses", None)


def test_a_module_that_ends_the_program_is_told_of(tmp_path, monkeypatch):
    (tmp_path / "quits_at_once.py").write_text("raise SystemExit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(UserCodeError, match="importing 'quits_at_once' raised SystemExit"):
        function_at("quits_at_once:f")


def test_one_place_alone_imports_by_a_name_that_an_experiment_may_hold():
    """All other imports by name take their names from tables in this program."""
    package = Path(ranker.__file__).parent.parent
    found = {
        str(file.relative_to(package)): line.strip()
        for file in package.rglob("*.py")
        for line in file.read_text().splitlines()
        if "import_module(" in line or "__import__(" in line
    }
    assert found == {
        "__init__.py": 'found = importlib.import_module(f"{__name__}.{module}")',
        "run/__init__.py": (
            'return importlib.import_module("selm_jax.api.runs").run(*arguments, **named)'
        ),
        "shell/user_code.py": "module = importlib.import_module(module_name)",
        "feedback/ranker.py": "builder = getattr(importlib.import_module(module), attribute)",
        "evaluation/benchmarks/alpaca_eval/score.py": (
            'found = importlib.import_module(f"alpaca_eval.{module}")'
        ),
    }
    assert all(each.startswith("selm_jax.") for each in ranker.BUILT_IN.values())
