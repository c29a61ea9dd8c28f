"""Methods that need more than log-ratios, through a whole run and through its resume."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.iterate import iterate
from selm_jax.run.check import check_objective
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.stages.train import plan_of, train
from selm_jax.tables import examples as table
from selm_jax.tables import ranked
from selm_jax.text.prompts import DataError
from selm_jax.weights.huggingface import load

METHODS = [
    {"loss": "nash", "beta": 0.5, "temperature": 10},
    {"loss": "geb", "beta": 0.1, "alpha": 0.01, "divergence": "hellinger"},
    {"loss": "discopop+0.1*sft", "beta": 0.1, "f_divergence": "js_divergence"},
    {"loss": "wpo", "beta": 0.1},
    {"loss": "ld_dpo", "beta": 0.1, "ld_alpha": 0.3},
    {"loss": "inpo", "beta": 0.1, "start_share": 0.25},
    {"loss": "copo", "beta": 0.1, "alpha": 0.01},
    {"loss": "se_popo", "beta": 0.1, "alpha": [0.01, 0.005]},
]
TOLD = ("nash", "inpo", "copo")  # two policies' logits, a second reference, a bonus: in every CI


def run_of(folder, name, objective):
    changes = {"objective": objective, "data__heldout": None, "output": str(folder / name)}
    return Run(config.load(tiny.experiment(folder, **changes)), Console(quiet=True))


def stop_at_the_third_update(run):
    apply, seen = run.programs.update.apply, []

    def stopping(*arguments):
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return apply(*arguments)

    run.programs.__dict__["update"] = run.programs.update._replace(apply=stopping)
    with pytest.raises(KeyboardInterrupt):
        iterate(run)


@pytest.mark.slow
@pytest.mark.parametrize(
    "objective",
    [
        pytest.param(each, id=each["loss"], marks=[] if each["loss"] in TOLD else pytest.mark.long)
        for each in METHODS
    ],
)
def test_a_run_that_is_stopped_between_updates_ends_as_one_that_is_not(objective, tmp_path):
    whole, resumed = run_of(tmp_path, "whole", objective), run_of(tmp_path, "resumed", objective)
    iterate(whole)
    stop_at_the_third_update(resumed)
    resumed = run_of(tmp_path, "resumed", objective)
    iterate(resumed)
    last = [load(run.policy(2).path, whole.programs.config) for run in (whole, resumed)]
    jax.tree.map(np.testing.assert_array_equal, *last)
    start = load(whole.start.path, whole.programs.config)
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: np.any(a != b), last[0], start)))


@pytest.mark.slow
def test_inpo_stores_a_mixture_of_the_start_model_and_the_policy_before(tmp_path):
    run = run_of(tmp_path, "run", {"loss": "inpo", "beta": 0.1, "start_share": 0.25})
    iterate(run)
    for t in (1, 2):
        made = table.read(run.folder.iteration(t) / "examples.parquet")
        start, before = (
            tiny.logps_of(run, run.programs.start_of(run.policy(u).path), made) for u in (0, t - 1)
        )
        for example, s, p in zip(made, start, before, strict=True):
            expected = 0.25 * np.array(s) + 0.75 * np.array(p)
            np.testing.assert_allclose(example.reference_logps, expected, rtol=1e-6)
    entry = json.loads((run.folder.iteration(2) / "stage.json").read_text())["score"]
    assert entry["settings"]["objective.start_share"] == 0.25 and "start" in entry["inputs"]


@pytest.mark.parametrize("changed", [{"reference": "live"}, {"reference_policy": "start"}])
def test_inpo_refuses_to_run_with_one_reference(changed, tmp_path):
    changes = {f"training__{key}": value for key, value in changed.items()}
    file = tiny.experiment(tmp_path, objective={"loss": "inpo", "beta": 0.1}, **changes)
    with pytest.raises(RunError, match="two references|only the start model"):
        check_objective(Run(config.load(file), Console(quiet=True)))


@pytest.mark.slow
def test_a_loss_gets_the_rankers_scores_and_refuses_examples_without_them(tmp_path):
    run = run_of(tmp_path, "run", METHODS[0])
    iterate(run)
    folder = run.folder.iteration(1)
    made = table.read(folder / "examples.parquet")
    rows = [row for row in ranked.read(folder / "ranked.parquet") if row.chosen]
    scores = {row.prompt_id: row.score for row in rows}
    assert len(made) == len(scores)
    for example in made:
        assert example.scores[example.roles["chosen"]] == scores[example.prompt_id]
        assert example.scores[example.roles["rejected"]] <= scores[example.prompt_id]
    bare = [dataclasses.replace(example, scores=None) for example in made]
    table.write(folder / "examples.parquet", bare)
    with pytest.raises(RunError, match="nash needs the ranker's scores of the answers"):
        plan_of(tiny.step_of(run, train, 1), tiny.stored(run, 1, "examples.parquet"))


@pytest.mark.slow
def test_ld_dpo_stores_the_shared_length_beside_whole_answers(tmp_path):
    run = run_of(tmp_path, "run", {"loss": "ld_dpo", "beta": 0.1, "ld_alpha": 0.3})
    iterate(run)
    folder = run.folder.iteration(2)
    made = table.read(folder / "examples.parquet")
    cut = [
        dataclasses.replace(e, responses=tuple(ids[: e.shared] for ids in e.responses))
        for e in made
    ]
    expected = tiny.logps_of(run, run.programs.start_of(run.policy(1).path), cut)
    assert any(e.shared_logps != e.reference_logps for e in made)
    for example, shared in zip(made, expected, strict=True):
        np.testing.assert_allclose(example.shared_logps, shared, rtol=1e-5)
    entry = json.loads((folder / "stage.json").read_text())["score"]
    assert entry["settings"]["objective.uses_shared"] is True
    bare = [dataclasses.replace(example, shared_logps=None) for example in made]
    table.write(folder / "examples.parquet", bare)
    with pytest.raises(RunError, match="ld_dpo needs the reference's log-probabilities of shared"):
        plan_of(tiny.step_of(run, train, 2), tiny.stored(run, 2, "examples.parquet"))


def with_bonus(folder, bonus, **changes):
    """An experiment with copo, whose data have bonus(row number) in the column `rare`."""
    copo = {"loss": "copo", "beta": 0.1, "alpha": 0.5}
    file = tiny.experiment(
        folder, **{"objective": copo, "data__heldout": None, "data__bonus": "rare"} | changes
    )
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    rows = [row | {"rare": bonus(i)} for i, row in enumerate(rows)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Run(config.load(file), Console(quiet=True))


@pytest.mark.slow
def test_copo_reads_the_bonus_from_a_column_of_the_data(tmp_path):
    run = with_bonus(tmp_path, lambda i: str(i / 4))  # a number that is stored as text is one
    iterate(run)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    asked = {prompt.id: float(prompt.row["rare"]) for prompt in run.data.every_prompt()}
    assert sorted(asked.values()) == sorted(float(row["rare"]) for row in rows)
    for t in (1, 2):
        made = table.read(run.folder.iteration(t) / "examples.parquet")
        assert made and all(example.bonus == asked[example.prompt_id] for example in made)
        plan = plan_of(tiny.step_of(run, train, t), tiny.stored(run, t, "examples.parquet"))
        trained = [example for update in plan.updates for example in update]
        assert all(example.bonus == asked[example.prompt_id] for example in trained)


@pytest.mark.parametrize(
    ("cell", "changes", "says"),
    [
        (-1, {}, "the bonus in column 'rare' is -1; expected a number of at least 0"),
        ("much", {}, "no number"),
        (1, {"data__bonus": "rarer"}, "missing column 'rarer'; did you mean 'rare'"),
        (1, {"objective": {"loss": "dpo", "beta": 0.1}}, "objective dpo reads no bonus"),
        (
            1,
            {"objective": {"loss": "copo", "beta": 0.1, "alpha": 0.5, "bits": 8}},
            r"objective\.bits: it has no effect.*Remove objective\.bits",
        ),
    ],
)
def test_a_bonus_that_cannot_be_read_is_refused_before_the_work(tmp_path, cell, changes, says):
    run = with_bonus(tmp_path, lambda i: cell if i == 3 else 1, **changes)
    with pytest.raises((RunError, DataError), match=says):
        check_objective(run)
