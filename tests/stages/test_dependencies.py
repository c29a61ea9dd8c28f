"""A change of an input is detected by exactly the stages that depend on it (all pairs are tried).

The tests compare what each stage of an iteration would write to `stage.json` before and after a
change. `tests/run/test_inputs.py` shows that a stage whose record has changed is refused.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.iterate import iterate, iteration, measure, run_stage
from selm_jax.run.run import Run
from selm_jax.stages import stage as stages

STAGES = ("generate", "rank", "score", "train", "export", "evaluate")
QUIET = Console(quiet=True)
RULE = "def rank(prompt, response, row):\n    return float({})\n"
PICK = """
from selm_jax.preferences.candidates import Pair
def pick(candidates, scores, rng):
    return Pair({}, 0) if scores[{}] > scores[0] else Pair(0, {})
"""


class Looks:
    """Asks for no stage; notes what each depends on as the run comes to it."""

    def __init__(self):
        self.found: dict[str, dict] = {}

    def says(self, stage, t):
        return "check"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of one iteration, with a rule of the user's as ranker and as pair rule."""
    folder = tmp_path_factory.mktemp("dependencies")
    sys.path.insert(0, str(folder))
    (folder / "rule_of_dependencies.py").write_text(RULE.format("len(response)"))
    (folder / "pick_of_dependencies.py").write_text(PICK.format(1, 1, 1))
    file = tiny.experiment(
        folder, iterations=1, training__learning_rate=1e-3, data__limit=8,
        training__global_batch=2, candidates__dataset=False,
        feedback={"ranker": "rule_of_dependencies:rank", "settings": {"workers": 1},
                  "rule": "pick_of_dependencies:pick"},
    )  # fmt: skip
    run = Run(config.load(file), QUIET)
    iterate(run)
    yield run
    sys.path.remove(str(folder))
    for name in ("rule_of_dependencies", "pick_of_dependencies"):
        sys.modules.pop(name, None)


def depends_on(experiment, monkeypatch) -> dict[str, dict]:
    """What each stage of iteration 1 depends on: digests of inputs, and settings."""
    run, found = Run(experiment, QUIET), {}

    def note(call: stages._Call) -> None:
        found[call.name] = dict(call.inputs()) | call.settings()

    monkeypatch.setattr(stages._Call, "check", note)
    run.wanted = Looks()
    iteration(run, 1, run.start)
    assert tuple(found) == STAGES
    return found


@pytest.fixture
def copy(run, tmp_path) -> Callable[[], Path]:
    """The run's files and its data, to be changed."""
    source = Path(run.experiment.output).parent
    shutil.copytree(source, tmp_path / "all", dirs_exist_ok=True)
    return tmp_path / "all"


def moved(experiment, folder: Path):
    """The experiment, reading and writing in another folder."""
    data = dataclasses.replace(
        experiment.data, train=str(folder / "train.jsonl"), heldout=str(folder / "heldout.jsonl")
    )
    model = dataclasses.replace(experiment.model, source=str(folder / "model"))
    return dataclasses.replace(experiment, data=data, model=model, output=str(folder / "run"))


def edit(file: Path, change: Callable[[str], str]) -> None:
    text = file.read_text()
    assert change(text) != text
    file.write_text(change(text))


def first_row(text: str) -> str:
    rows = text.splitlines()
    return "\n".join([json.dumps(json.loads(rows[0]) | {"prompt": "Another."}), *rows[1:]]) + "\n"


def other_ids(text: str) -> str:
    tree = json.loads(text)
    vocab = tree["model"]["vocab"]
    vocab["e"], vocab["s"] = vocab["s"], vocab["e"]
    return json.dumps(tree)


def flip(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(bytes(raw))


START = {"generate", "score", "train", "export", "evaluate"}  # given the start model's bytes
CHAT = {"generate", "rank", "score", "evaluate"}
# The files of the start model lie in its folder, so tokenizer and template are bytes of it, too.
CHANGES = {
    "a data row": (lambda d: edit(d / "train.jsonl", first_row), {"generate", "rank", "score"}),
    "a held-out row": (lambda d: edit(d / "heldout.jsonl", first_row), {"evaluate"}),
    "the tokenizer": (lambda d: edit(d / "model/tokenizer.json", other_ids), CHAT | START),
    "the template": (
        lambda d: edit(
            d / "model/chat_template.jinja",
            lambda t: t.replace("content'] }}", "content'] }}."),
        ),
        CHAT | START,
    ),
    "the start model's weights": (lambda d: flip(d / "model/model.safetensors"), START),
    "the ranker's source": (
        lambda d: edit(
            Path(sys.path[0]) / "rule_of_dependencies.py",
            lambda t: t.replace("float(", "-float("),
        ),
        {"rank", "evaluate"},
    ),
    "the pair rule's source": (
        lambda d: edit(Path(sys.path[0]) / "pick_of_dependencies.py", lambda t: t + "\n# other\n"),
        {"rank"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_an_input_is_seen_where_it_matters(change, run, copy, monkeypatch):
    experiment = moved(run.experiment, copy)
    before = depends_on(experiment, monkeypatch)
    work, expected = CHANGES[change]
    rules = {file: file.read_text() for file in Path(sys.path[0]).glob("*_of_dependencies.py")}
    try:
        work(copy)
        after = depends_on(experiment, monkeypatch)
    finally:
        for file, text in rules.items():
            file.write_text(text)
    assert {name for name in STAGES if before[name] != after[name]} == expected


SETTINGS = {
    "seed=1": {"generate", "rank", "train", "evaluate"},
    "candidates.samples=3": {"generate"},
    "rollout.temperature=0.7": {"generate"},
    "rollout.max_new_tokens=13": {"generate", "evaluate"},
    "rollout.slots=4": set(),
    "feedback.ties=first": {"rank"},
    "feedback.labels.flip=0.1": {"rank"},
    "feedback.prompts_per_part=3": set(),
    "feedback.settings.workers=2": set(),
    "text.special_tokens=as_text": {"generate", "rank", "score", "evaluate"},
    "text.layout=paper": {"rank", "score"},
    "objective.alpha=0.02": {"train"},
    "objective.beta=0.2": {"train", "evaluate"},
    "training.epochs=2": {"train"},
    "training.row_length=160": {"score", "train", "evaluate"},
    "training.parameter_dtype=bfloat16": {"generate", "score", "train", "export", "evaluate"},
    "training.checkpoint_every=7": set(),
    "compute.dtype=bfloat16": {"generate", "score", "train", "evaluate"},
    "evaluation.samples=2": {"evaluate"},
    "lora={rank: 2, alpha: 4}": {"score", "train", "export", "evaluate"},
    "model.keep_vision=false": {"export"},
    "log.tensorboard=true": set(),
}


@pytest.mark.parametrize("change", SETTINGS)
def test_a_change_of_a_setting_is_seen_where_it_matters(change, run, monkeypatch):
    before = depends_on(run.experiment, monkeypatch)
    text = config.dump(run.experiment)
    file = Path(run.experiment.output).parent / "as_dumped.yaml"
    file.write_text(text)
    after = depends_on(config.load(file, [change]), monkeypatch)
    # The export's digest of the training is read from the training's record, not recomputed.
    assert {name for name in STAGES if before[name] != after[name]} == SETTINGS[change]


def test_the_start_is_measured_on_held_out_prompts_alone(run, monkeypatch):
    found = {}
    monkeypatch.setattr(
        stages._Call, "check", lambda call: found.update({call.name: call.inputs()})
    )
    again = Run(run.experiment, QUIET)
    again.wanted = Looks()
    measure(again, 0, again.start)
    assert set(found["evaluate"]) == {
        "policy", "start", "heldout", "chat", "feedback.ranker rule_of_dependencies:rank",
    }  # fmt: skip


def test_one_stage_alone_and_then_all(run):
    """The stages before the one that is asked for are looked at, those after it left."""
    again = Run(run.experiment, QUIET)
    run_stage(again, "rank", 1)
    assert again.wanted.did == {("rank", 1): False}
    iterate(again)
    every = {("evaluate", 0): False} | {(name, 1): False for name in STAGES}
    assert again.wanted.did == every


def test_a_stage_that_is_given_no_prompts_says_so(run):
    data = dataclasses.replace(run.experiment.data, heldout=None)
    experiment = dataclasses.replace(run.experiment, data=data)
    again = Run(experiment, Console(record=True, width=200))
    run_stage(again, "evaluate", 1)
    assert (
        "evaluate: nothing to do, because there are no held-out prompts"
        in again.console.export_text()
    )
