"""Commands that only read a run folder or an experiment never import the code that it names."""

import contextlib
import importlib
import shutil
import sys

import pytest
import tiny
import yaml
from rich.console import Console

from selm_jax import cli, config
from selm_jax.annotate import server
from selm_jax.iterate import iterate, run_stage
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.shell.sealed import sha256

MODULE = """
import pathlib
pathlib.Path(__file__).with_name("imported").touch()
from selm_jax.objectives.losses import dpo

def loss(beta):
    return dpo(beta)

def rule(prompt, response, row):
    return float(len(response))

def pick(candidates, scores, rng):
    return 0
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run whose answers are there and whose loss is code of the user's, and its experiment."""
    folder = tmp_path_factory.mktemp("looked_at")
    (folder / "code_of_mine.py").write_text(MODULE)
    file = tiny.experiment(
        folder, iterations=1, training__learning_rate=1e-3,
        objective={"loss": "code_of_mine:loss", "beta": 0.1},
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        importlib.invalidate_caches()
        run_stage(Run(config.load(file), Console(quiet=True)), "generate", 1)
        assert (folder / "imported").exists()  # the run itself runs it
    return folder


@pytest.fixture
def mine(folder, monkeypatch):
    """The folder, its module on the path and not imported yet."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.chdir(folder)
    sys.modules.pop("code_of_mine", None)
    (folder / "imported").unlink(missing_ok=True)
    return folder


def selm(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["selm", *map(str, arguments)])
    cli.main()


def whose_code_is(folder, tmp_path, loss, rule, name="run"):
    """A copy of a run folder that names this code."""
    copy = tmp_path / "copy"
    shutil.copytree(folder / name, copy)
    tree = yaml.safe_load((copy / "config.yaml").read_text())
    tree["objective"] = {"loss": loss, "beta": 0.1}
    tree["feedback"] |= {"ranker": rule, "settings": {}, "rule": PICK, "explore": PICK}
    tree["rollout"]["filter"] = PICK
    tree["data"]["on_bad_row"] = "drop"
    (copy / "config.yaml").write_text(yaml.safe_dump(tree))
    manifest = artifacts.read_sealed(copy / "manifest.json")
    manifest["config_sha256"] = sha256(copy / "config.yaml")
    artifacts.write_sealed(copy / "manifest.json", manifest)
    return copy


LOSS, RULE, PICK = (f"code_of_mine:{name}" for name in ("loss", "rule", "pick"))


def test_annotate_report_and_preview_import_nothing(mine, tmp_path, monkeypatch):
    run = whose_code_is(mine, tmp_path, LOSS, RULE)
    monkeypatch.setattr(server, "serve", lambda *_: None)
    selm(monkeypatch, "annotate", run)
    selm(monkeypatch, "report", run, "-o", tmp_path / "page.html")
    for given in ([run], [run / "config.yaml", f"output={run}"]):
        with contextlib.suppress(SystemExit):  # its settings are not those of its rows
            selm(monkeypatch, "preview", *given, "--rows", "2")
    assert not (mine / "imported").exists() and "code_of_mine" not in sys.modules


@pytest.mark.slow
def test_figures_import_nothing(mine, tmp_path, monkeypatch):
    file = mine / "experiment.yaml"
    changes = ["objective.loss=dpo", f"output={tmp_path}/dpo"]
    iterate(Run(config.load(file, changes), Console(quiet=True)))
    base = whose_code_is(tmp_path, tmp_path / "base", "dpo", RULE, "dpo")
    run = whose_code_is(tmp_path, tmp_path / "mine", LOSS, RULE, "dpo")
    selm(monkeypatch, "figures", base, run, "-o", tmp_path / "figures")
    assert {
        "figure4_implicit_rewards.svg",
        "figure4_implicit_rewards.pdf",
        "figure5_own_samples.svg",
    } <= {each.name for each in (tmp_path / "figures").iterdir()}
    assert not (mine / "imported").exists() and "code_of_mine" not in sys.modules


def test_preview_of_an_experiment_file_builds_the_users_loss_and_ranker(
    mine, tmp_path, monkeypatch, capsys
):
    given = ["preview", mine / "experiment.yaml", f"output={tmp_path}/new"]
    selm(monkeypatch, *given, f"feedback.ranker={RULE}")
    assert (mine / "imported").exists()
    capsys.readouterr()
    for change in ("objective.loss=code_of_mine:los", "feedback.ranker=code_of_mine:rul"):
        with pytest.raises(SystemExit) as stop:
            selm(monkeypatch, *given, change)
        told = capsys.readouterr()
        assert stop.value.code == 1 and change.partition("=")[2] in told.out + told.err


NAMES = {
    "a loss": ({"objective": {"loss": "os:system", "command": "touch ran"}}, "objective.loss"),
    "a term": ({"objective": {"loss": "dpo+os:popen", "cmd": "touch ran"}}, "objective.loss"),
    "a rule": ({"feedback": {"ranker": "os:system"}}, "feedback.ranker"),
    "a pair rule": ({"feedback": {"rule": "os:system"}}, "feedback.rule"),
    "an explore rule": ({"feedback": {"explore": "os:system"}}, "feedback.explore"),
    "a filter": ({"rollout": {"filter": "os:system"}}, "rollout.filter"),
    "a part": (
        {"feedback": {"ranker": "mixture", "settings": {"parts": [{"ranker": "os:system"}]}}},
        "feedback.settings.parts.0.ranker",
    ),
}
VERBS = (
    *("run", "run --tiny", "preview", "plan", "generate -t 1", "rank -t 1", "score -t 1"),
    *("train -t 1", "export -t 1", "evaluate -t 1", "annotate", "figures", "eval winrate"),
)


@pytest.mark.parametrize("change,key", NAMES.values(), ids=NAMES)
def test_every_verb_refuses_a_folder_that_names_code_of_others(
    mine, tmp_path, monkeypatch, capsys, change, key
):
    run = whose_code_is(mine, tmp_path, LOSS, RULE)
    tree = yaml.safe_load((run / "config.yaml").read_text()) | change
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(Run, "__init__", None)  # it is refused before there is a run
    for verb in VERBS:
        name, *options = verb.split()
        given = run if name in ("annotate", "figures", "eval") else run / "config.yaml"
        with pytest.raises(SystemExit) as stop:
            selm(monkeypatch, name, *options, given)
        assert stop.value.code == 1
        message = capsys.readouterr().err
        assert f"{key}: 'os:" in message and "'os' is part of Python" in message, verb
    assert not (mine / "ran").exists() and not (mine / "imported").exists()


def test_a_run_that_is_looked_at_never_asks_its_code(mine):
    file = mine / "experiment.yaml"
    changes = [f"feedback.ranker={RULE}", f"feedback.rule={PICK}", f"output={mine / 'made'}"]
    run = Run(config.load(file, changes), imports=False)
    for part in (lambda: run.task.objective, lambda: run.ranker):
        with pytest.raises(RunError, match="only reads the folder"):
            part()
    assert not run.task.rates and not run.task.reference_free  # it has not begun
    run.folder.path.mkdir()
    artifacts.write_sealed(
        run.folder.path / "manifest.json", {"rates": True, "reference_free": True}
    )
    run = Run(run.experiment, imports=False)
    assert run.task.rates and run.task.reference_free
    assert not (mine / "imported").exists()
