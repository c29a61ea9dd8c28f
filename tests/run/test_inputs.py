"""A change of a result's inputs is detected: tokenizer, template, data, the source of a rule.

The tests use only the command line and the tables of a run folder: however a run keeps its records,
no result may mix the token ids of two models, two states of the data, or two rules.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import tiny
import tokenizers
import yaml

from selm_jax import cli

# Answers of the data, taught as they are: no weights are needed until something is scored.
TAUGHT = {
    "iterations": 1, "training__learning_rate": 1e-3, "objective": {"loss": "dpo", "beta": 0.1},
    "candidates": {"greedy": 0, "samples": 0, "dataset": True}, "data__heldout": None,
    "data__chosen": "chosen", "data__rejected": "rejected",
}  # fmt: skip
CHANGED = r"(was|has|have) .*(changed|is now)|not what it wrote"


def write_pairs(file: Path, say: str = "Say") -> None:
    rows = [
        {"prompt_id": f"p{i}", "prompt": f"{say} {i}.", "chosen": "Yes, I do.", "rejected": "No."}
        for i in range(8)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def folder(tmp_path, model) -> Path:
    """A model, eight pairs, and an experiment that teaches them."""
    shutil.copytree(model, tmp_path / "model")
    write_pairs(tmp_path / "train.jsonl")
    tiny.experiment(tmp_path, **TAUGHT)
    return tmp_path


@pytest.fixture
def selm(monkeypatch, capsys):
    """`selm(ARGUMENTS)`: its status, and what it said on standard error."""

    def run(*arguments) -> tuple[int, str]:
        which = [] if arguments[0] in ("run", "sweep") else ["-t", "1"]
        monkeypatch.setattr(sys, "argv", ["selm", *map(str, arguments), *which])
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
        found = capsys.readouterr()
        said = found.out + found.err
        assert "Traceback" not in said
        return status, said

    return run


def done(outcome: tuple[int, str]) -> bool:
    status, said = outcome
    assert status == 0, said
    return True


def refused(outcome: tuple[int, str]) -> str:
    status, said = outcome
    assert status == 1, said
    return " ".join(said.split())


def other_ids(model: Path) -> None:
    """The same letters under other numbers, as two models of the same size have."""
    file = model / "tokenizer.json"
    tree = json.loads(file.read_text())
    vocab = tree["model"]["vocab"]
    vocab["e"], vocab["s"] = vocab["s"], vocab["e"]
    file.write_text(json.dumps(tree))


def ids_are_of(run: Path, model: Path) -> bool:
    """Whether the answers that a run was trained on are spelled with this model's tokenizer."""
    right = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json"))
    wanted = {tuple(right.encode(f"{text}<|im_end|>").ids) for text in ("Yes, I do.", "No.")}
    rows = pq.read_table(run / "iteration_1" / "examples.parquet").to_pylist()
    found = {tuple(ids) for row in rows for ids in _responses(row)}
    assert found
    return found == wanted


def _responses(row: dict) -> list[list[int]]:
    """The lists of ids in a row of examples.parquet that are no prompt, however they are named."""
    key = next(k for k in row if "response" in k)
    return row[key]


@pytest.mark.slow
def test_two_models_of_a_sweep_do_not_share_token_ids(folder, selm):
    """Though their weights are the same, and every setting but the model."""
    second = shutil.copytree(folder / "model", folder / "second")
    other_ids(second)
    grid = {"model": {"one": {}, "two": {"model.source": str(second)}}}
    said = {"output": str(folder / "sweep"), "base": str(folder / "experiment.yaml"), "grid": grid}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(said | {"seeds": [1]}))
    assert done(selm("sweep", folder / "sweep.yaml"))
    runs = {f.parents[1] for f in (folder / "sweep").rglob("iteration_1/examples.parquet")}
    models = {run: yaml.safe_load((run / "config.yaml").read_text())["model"] for run in runs}
    assert {Path(each["source"]).name for each in models.values()} == {"model", "second"}
    for run, each in models.items():
        assert ids_are_of(run, Path(each["source"]))
        assert not ids_are_of(
            run, second if Path(each["source"]).name == "model" else folder / "model"
        )


def test_a_template_that_has_changed_is_seen(folder, selm):
    experiment = folder / "experiment.yaml"
    assert done(selm("generate", experiment)) and done(selm("rank", experiment))
    (folder / "model" / "chat_template.jinja").write_text(
        tiny.TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] }}.")
    )
    for verb in ("rank", "score", "run"):
        refused(selm(verb, experiment))
    assert not (folder / "run" / "iteration_1" / "examples.parquet").exists()


def test_a_tokenizer_that_has_changed_is_seen(folder, selm):
    experiment = folder / "experiment.yaml"
    assert done(selm("generate", experiment)) and done(selm("rank", experiment))
    other_ids(folder / "model")
    for verb in ("score", "run"):
        refused(selm(verb, experiment))
    assert not (folder / "run" / "iteration_1" / "examples.parquet").exists()


@pytest.mark.parametrize("scored", [False, True])
def test_data_that_has_changed_is_seen_before_it_is_scored(folder, selm, scored):
    """Old answers behind new prompts would be trained on."""
    experiment = folder / "experiment.yaml"
    for verb in ("generate", "rank", *["score"] * scored):
        assert done(selm(verb, experiment))
    write_pairs(folder / "train.jsonl", say="Never say")
    assert "changed" in refused(selm("score", experiment))
    assert (folder / "run" / "iteration_1" / "examples.parquet").exists() == scored


RULE = "def rule(prompt, response, row):\n    return {}\n"
LOSS = """
from selm_jax.objectives.losses import dpo
def loss(beta):
    return dpo(beta={})
"""


@pytest.fixture
def rules(folder, monkeypatch):
    """A module of the user's, `mine`, which can be written anew."""
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")
    yield folder / "mine_of_inputs.py"
    sys.modules.pop("mine_of_inputs", None)


def test_a_rule_whose_source_has_changed_is_seen(folder, selm, rules):
    rules.write_text(RULE.format("float(len(response))"))
    changes = {"candidates": {"greedy": 1, "samples": 1, "dataset": True}}
    rule = {"feedback": {"ranker": "mine_of_inputs:rule", "settings": {"workers": 1}}}
    mixed = {"ranker": "mixture", "settings": {"parts": [{"ranker": "length"}, rule["feedback"]]}}
    for name, feedback in (("alone", rule["feedback"]), ("mixed", mixed)):
        rules.write_text(RULE.format("float(len(response))"))
        experiment = tiny.experiment(
            folder, **TAUGHT | changes, feedback=feedback, output=str(folder / name)
        )
        assert done(selm("generate", experiment)) and done(selm("rank", experiment))
        assert done(selm("rank", experiment))  # nothing has changed
        rules.write_text(RULE.format("-float(len(response))"))
        said = refused(selm("rank", experiment))
        assert "mine_of_inputs:rule" in said and "changed" in said


PICK = """
from selm_jax.preferences.candidates import Pair
def pair(candidates, scores, rng):
    return Pair({0}, 1 - {0})
def explore(candidates, scores, rng):
    return {0}
"""


@pytest.mark.parametrize("setting", ["pair", "explore"])
def test_a_pair_rule_whose_source_has_changed_is_seen(folder, selm, rules, setting):
    rules.write_text(PICK.format(0))
    changes = {"candidates": {"greedy": 1, "samples": 1, "dataset": True}}
    key = {"pair": "rule", "explore": "explore"}[setting]
    feedback = {"ranker": "length", key: f"mine_of_inputs:{setting}"}
    experiment = tiny.experiment(folder, **TAUGHT | changes, feedback=feedback)
    for verb in ("generate", "rank", "rank"):
        assert done(selm(verb, experiment))
    rules.write_text(PICK.format(1))
    for verb in ("rank", "score", "run"):
        said = refused(selm(verb, experiment))
        assert f"feedback.{key} mine_of_inputs:{setting}" in said and "changed" in said


FILTER = "def keep(logits, t):\n    return {} * logits\n"


def test_a_filter_whose_source_has_changed_is_seen(folder, selm, rules):
    rules.write_text(FILTER.format(1))
    changes = {"candidates": {"greedy": 1, "samples": 1, "dataset": True}}
    experiment = tiny.experiment(folder, **TAUGHT | changes)
    assert done(selm("generate", experiment))
    filtered = tiny.experiment(folder, **TAUGHT | changes, rollout__filter="mine_of_inputs:keep")
    assert "rollout.filter" in refused(selm("generate", filtered))
    filtered = tiny.experiment(
        folder,
        **TAUGHT | changes,
        rollout__filter="mine_of_inputs:keep",
        output=str(folder / "two"),
    )
    assert done(selm("generate", filtered)) and done(selm("generate", filtered))
    rules.write_text(FILTER.format(2))
    said = refused(selm("generate", filtered))
    assert "rollout.filter mine_of_inputs:keep" in said and "changed" in said


def test_a_loss_whose_source_has_changed_is_seen(folder, selm, rules):
    rules.write_text(LOSS.format("beta"))
    objective = {"loss": "mine_of_inputs:loss", "beta": 0.1}
    experiment = tiny.experiment(folder, **TAUGHT | {"objective": objective})
    for verb in ("generate", "rank", "score", "train"):
        assert done(selm(verb, experiment))
    rules.write_text(LOSS.format("2 * beta"))
    for verb in ("train", "export", "run"):
        said = refused(selm(verb, experiment))
        assert "mine_of_inputs:loss" in said and "changed" in said
