"""A run's capability guard measures tasks of lm-eval: local ones, without the network."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from scipy import stats
from tiny import PROMPTS, do, experiment, make_model, on_first_device

from selm_jax import config
from selm_jax.evaluation import EvaluationError, task_scores
from selm_jax.report import page
from selm_jax.run.check import check
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.tables import task_scores as tasks_table

pytest.importorskip("lm_eval", reason="lm-eval is not installed (the extra `lm-eval`)")
from lm_eval import simple_evaluate
from lm_eval.api import metrics
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from selm_jax.evaluation.benchmarks.lm_eval import adapter, guard
from selm_jax.evaluation.benchmarks.lm_eval import tasks as lm_eval_tasks
from selm_jax.evaluation.model import open_model

NAMES = ["local_choice:1", "local_last", "local_book", "pair"]
MARK = "def seen(doc, choices):\n    return doc['question'] + ':'\n"


@pytest.fixture(autouse=True)
def on_one_device(monkeypatch, local_tasks):
    on_first_device(monkeypatch)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    """Tasks on local rows, such as choices with a shot, and groups of two of them."""
    folder = tmp_path_factory.mktemp("tasks")
    choices = ["a river", "a chair", "a song"]
    rows = [
        {"question": text, "choices": choices, "answer": i % 3} for i, text in enumerate(PROMPTS)
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows[:24]))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test", "fewshot_split": "test",
    }  # fmt: skip
    short = folder / "few.jsonl"
    short.write_text("".join(json.dumps(row) + "\n" for row in rows[24:31]))
    few = {"dataset_kwargs": {"data_files": {"test": str(short)}}}
    choice = {
        "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "higher_is_better": True}],
    }  # fmt: skip
    last = {
        "output_type": "loglikelihood", "doc_to_text": "{{question.split(' ')[:-1] | join(' ')}}",
        "doc_to_target": "{{' ' + question.split(' ')[-1]}}",
        "metric_list": [
            {"metric": "perplexity", "higher_is_better": False},
            {"metric": "acc", "higher_is_better": True},
        ],
    }  # fmt: skip
    book = {
        "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "question",
        "metric_list": [
            {"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")
        ],
    }  # fmt: skip
    further = {
        "local_book": book, "many": choice, "few": {**choice, **few}, "few_last": {**last, **few},
        "other_key": {**choice, "doc_to_target": "{{ (answer + 1) % 3 }}"},
        "runs_code": {**last, "unsafe_code": True},
        "shows_images": {**last, "doc_to_image": "question"},
        "beams": {
            "output_type": "generate_until", "doc_to_text": "question", "doc_to_target": "answer",
            "generation_kwargs": {"num_beams": 4, "until": ["."]},
            "metric_list": [{"metric": "exact_match", "higher_is_better": True}],
        },
    }  # fmt: skip
    for name, rest in {"local_choice": choice, "local_last": last, **further}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **common, **rest}))
    of_acc = [{"metric": "acc"}]
    alike = [{"metric": name, "weight_by_size": False} for name in ("acc", "perplexity")]
    for group, members, measures in (
        ("pair", ["many", "inner"], of_acc),
        ("inner", ["few"], of_acc),
        ("alike", ["many", "few_last", "local_last"], alike),
        ("lists", ["pair", "local_last"], None),
        ("nothing", ["few"], [{"metric": "bleu"}]),
    ):
        asked = {"group": group, "task": members, "aggregate_metric_list": measures}
        kept = {key: value for key, value in asked.items() if value is not None}
        (folder / f"{group}.yaml").write_text(yaml.safe_dump(kept))
    return folder


def written(folder: Path, tasks: Path, **changes) -> config.Experiment:
    changes = {"evaluation__tasks": NAMES, "evaluation__task_folder": str(tasks)} | changes
    return config.load(experiment(folder, **changes))


@pytest.fixture(scope="module")
def run(tmp_path_factory, tasks, local_tasks):
    """A run whose start model and first iteration, another random model, have been measured."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        on_first_device(patch)
        run = Run(
            written(folder, tasks, evaluation__task_limit=20), Console(record=True, width=200)
        )
        check(run)
        run.open()
        make_model(run.folder.iteration(1) / "model", seed=1)
        assert do(run, "evaluate", 0) and do(run, "evaluate", 1)
    return run


def lines(run) -> list[dict]:
    return [json.loads(line) for line in run.folder.metrics_file.read_text().splitlines()]


def test_scores_and_standard_errors_are_those_of_lm_eval(run, tasks, monkeypatch):
    """The slow way: lm-eval's own evaluation of the model folder, tasks loaded anew."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap would fork
    model = open_model(str(run.model.folder.path), console=Console(quiet=True))
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    found = simple_evaluate(
        adapter.Harness(model, run.experiment.seed), task_manager=manager, limit=20,
        tasks=lm_eval_tasks.load_tasks({"local_choice": 1, "local_last": None}, manager),
        apply_chat_template=True, fewshot_as_multiturn=True, bootstrap_iters=2,
    )["results"]  # fmt: skip
    start = lines(run)[0]
    for task, measure in (("local_choice", "acc"), ("local_last", "acc")):
        got, name = found[task], f"tasks/{task}/{measure}"
        assert start[name] == pytest.approx(got[f"{measure},none"])
        assert start[f"{name}_stderr"] == pytest.approx(got[f"{measure}_stderr,none"])
    perplexity = start["tasks/local_last/perplexity"]
    assert perplexity == pytest.approx(found["local_last"]["perplexity,none"], rel=1e-4)


@pytest.mark.parametrize("name", ["pair", "alike"])
def test_a_group_has_the_aggregate_of_lm_eval(run, tasks, monkeypatch, name):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    model = run.programs.policy(run.start.path, run.chat)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    want = simple_evaluate(
        adapter.Harness(model.fitting(), run.experiment.seed), task_manager=manager, limit=20,
        tasks=lm_eval_tasks.load_tasks({name: None}, manager), bootstrap_iters=2,
        apply_chat_template=True, fewshot_as_multiturn=True,
    )["results"]  # fmt: skip
    settings = dataclasses.replace(run.experiment.evaluation, tasks=[name])
    rows = guard.load(settings, run.experiment.seed).measure(model)
    totals = {row.measure: row for row in rows if row.question is None}
    assert {f"{key},none" for key in totals} == {
        key for key in want[name] if key.endswith(",none") and "_stderr" not in key
    }
    assert all(row.task == name for row in totals.values())
    total = totals["acc"]
    assert (total.value, total.stderr, total.higher_is_better) == (
        pytest.approx(want[name]["acc,none"]), pytest.approx(want[name]["acc_stderr,none"]), True,
    )  # fmt: skip
    # The weighted mean by hand: of 20 and 7 questions, or of three tasks that count alike.
    members = {"pair": {"many": 20, "few": 7}, "alike": {"many": 1, "few_last": 1, "local_last": 1}}
    scores = {
        member: np.mean([r.value for r in rows if r.task == member and r.measure == "acc"])
        for member in members[name]
    }
    for member, score in scores.items():
        assert score == pytest.approx(want[member]["acc,none"])
    weights = list(members[name].values())
    assert total.value == pytest.approx(np.average(list(scores.values()), weights=weights))
    if name == "alike":  # the perplexity of two of the three
        values = [want[member]["perplexity,none"] for member in ("few_last", "local_last")]
        assert totals["perplexity"].value == pytest.approx(np.mean(values))
        assert totals["perplexity"].higher_is_better is False


def test_a_group_without_an_aggregate_is_short_for_its_members(run):
    settings = dataclasses.replace(run.experiment.evaluation, tasks=["lists"], task_limit=2)
    loaded = guard.load(settings, 0)
    rows = loaded.measure(run.programs.policy(run.start.path, run.chat))
    assert [row.group for row in rows if row.task == "local_last"] == [None] * 4
    assert {row.group for row in rows if row.task != "local_last"} == {"pair"}


def test_a_group_with_nothing_to_aggregate_is_an_error(run):
    settings = dataclasses.replace(run.experiment.evaluation, tasks=["nothing"], task_limit=1)
    with pytest.raises(EvaluationError, match="found nothing to aggregate in the group nothing"):
        guard.load(settings, 0).measure(run.programs.policy(run.start.path, run.chat))


@pytest.mark.parametrize(
    "aggregate", [metrics.perplexity, metrics.weighted_perplexity, metrics.bits_per_byte]
)
def test_a_perplexity_has_the_error_of_the_bootstrap(aggregate, monkeypatch):
    """The bootstrap is lm-eval's own, over documents."""
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    rng = np.random.default_rng(0)
    sizes = rng.integers(20, 200, 150)
    logps = -sizes * rng.gamma(20, 0.1, 150)
    items = list(zip(logps, sizes, strict=True))
    if aggregate is metrics.perplexity:
        items = list(logps / sizes)
    parts = guard._by_question(aggregate, items)
    assert parts.mean() == pytest.approx(aggregate(items))
    want = metrics.bootstrap_stderr(aggregate, items, 1000)
    assert stats.sem(parts) == pytest.approx(want, rel=0.08)


def test_the_error_of_a_perplexity_by_hand():
    """Three documents of 1, 2 and 1 words: the loss is 8 nats on 4 words, so 2 nats on each."""
    parts = guard._by_question(metrics.weighted_perplexity, [(-1.0, 1), (-5.0, 2), (-2.0, 1)])
    residuals = np.array([-1.0, 1.0, 0.0])  # a document's loss, less 2 nats on each of its words
    error = np.exp(2) * np.sqrt(3 / 2 * np.sum(residuals**2)) / 4
    assert parts.mean() == pytest.approx(np.exp(2)) and stats.sem(parts) == pytest.approx(error)


def test_changes_are_paired_with_the_start_model_and_all_is_recorded(run):
    start, after = lines(run)
    tables = [pq.read_table(run.folder.iteration(t) / "tasks.parquet").to_pandas() for t in (0, 1)]
    means = [table.groupby(["task", "measure"]).value.mean() for table in tables]
    for key, value in (means[1] - means[0]).items():
        name = f"tasks/{'/'.join(key)}"
        if key[0] not in ("many", "few", "pair"):
            assert after[f"{name}_change"] == pytest.approx(value)
            assert after[f"{name}_change_low"] <= value <= after[f"{name}_change_high"]
    pair = [after["tasks/pair/acc"], start["tasks/pair/acc"]]
    assert after["tasks/pair/acc_change"] == pytest.approx(pair[0] - pair[1])
    assert not {key.split("/")[1] for key in after if "/acc" in key} & {"many", "few", "inner"}
    assert not any("change" in key for key in start) and "tasks/fallen" not in start
    assert "heldout/reward_greedy" in after
    record = json.loads((run.folder.iteration(1) / "stage.json").read_text())["evaluate"]
    assert "tasks.parquet" in record["outputs"]
    assert {"tasks.parquet", "evaluation.task_folder"} <= set(record["inputs"])
    assert record["settings"]["evaluation.tasks"] == NAMES
    assert "local_choice, acc: " in run.console.export_text(clear=False)


def test_a_perplexity_that_rises_is_a_warning(run):
    start = tasks_table.read(run.folder.iteration(0) / "tasks.parquet")
    names = [f"tasks/local_book/{name}" for name in ("byte_perplexity", "bits_per_byte")]
    for factor, fallen in ((1.1, names), (0.9, [])):
        after = [
            dataclasses.replace(row, value=row.value * factor)
            if f"tasks/{row.task}/{row.measure}" in names
            else row
            for row in start
        ]
        assert task_scores.fallen(after, task_scores.summarize(after, start)) == fallen


def test_a_stage_that_is_done_measures_and_loads_nothing(run, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the tasks were loaded again")

    monkeypatch.setattr(guard, "load", never)
    again = Run(run.experiment, Console(quiet=True))
    assert not do(again, "evaluate", 1)


def test_the_page_shows_scores_errors_and_changes(run, tmp_path):
    page.write([run.folder.path], tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert "Tasks of the capability guard" in text and "local_choice: acc" in text
    shown = text[text.index("Tasks of the capability guard</") :]
    assert text.index("Held-out reward") < text.index("Tasks of the capability guard")
    assert shown.count('<th scope="row">local_last</th><td>perplexity</td>') == 2
    assert shown.count('<th scope="row">pair</th>') == 2
    assert '<th scope="row">many</th>' not in shown
    assert "Standard error" in shown


def test_measuring_twice_gives_the_same(run):
    tasks = run.data.loaded_tasks
    model = run.programs.policy(run.start.path, run.chat)
    once, again = tasks.measure(model), tasks.measure(model)
    assert once == again
    stored = pq.read_table(run.folder.iteration(0) / "tasks.parquet").to_pylist()
    assert [row.value for row in once] == [row["value"] for row in stored]
    single = [row for row in once if row.group is None and row.measure == "acc"]
    assert len({row.prompt for row in single}) == 40


def test_a_task_longer_than_the_runs_rows_is_measured(run):
    """Rows of a run fit its own data; those of tasks fit theirs."""
    assert run.experiment.training.row_length == 128
    model = run.programs.policy(run.start.path, run.chat)
    long = [("Describe " + "a river " * 60, " chair")]
    harness = adapter.Harness(model.fitting())
    (found,) = harness.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in long])
    assert np.isfinite(found[0])


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (["local_chose"], r"no task 'local_chose'.*did you mean.*evaluation\.task_folder adds"),
        (["local_choice:24"], "24 shots, but there are only 23 rows"),
        (["pair", "few"], "task few: both pair and few stand for it. Name one of them"),
        (["local_last", "local_last:0"], "evaluation.tasks has local_last twice"),
        (["local_last", "runs_code"], "task runs_code: it runs code.*Leave this task out"),
        (["shows_images"], "task shows_images: it shows images.*Leave this task out"),
    ],
)
def test_what_cannot_be_measured_is_an_error_before_any_work(tmp_path, tasks, names, says):
    run = Run(written(tmp_path, tasks, evaluation__tasks=names), Console(quiet=True))
    with pytest.raises(EvaluationError, match=says):
        check(run)
    assert not run.folder.path.exists()


def test_a_process_in_which_lm_eval_gives_nothing_is_an_error_before_any_work(
    tmp_path, tasks, monkeypatch
):
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(EvaluationError, match="Unset LOCAL_RANK"):
        check(Run(written(tmp_path, tasks), Console(quiet=True)))


def test_a_task_that_does_not_fit_the_model_costs_no_answers(tmp_path, tasks, monkeypatch):
    def never(*_, **__):
        raise AssertionError("the policy answered the held-out prompts")

    monkeypatch.setattr("selm_jax.stages.evaluate.answer", never)
    run = Run(written(tmp_path, tasks, evaluation__tasks=["beams"]), Console(quiet=True))
    run.open()
    with pytest.raises(EvaluationError, match="num_beams, which this engine does not support"):
        do(run, "evaluate", 0)


def test_a_changed_answer_key_is_noticed(run):
    """The rows, the prompts and the choices of `other_key` are those of `local_choice`."""
    model, settings = run.programs.policy(run.start.path, run.chat), run.experiment.evaluation
    found = []
    for name in ("local_choice", "other_key"):
        asked = dataclasses.replace(settings, tasks=[f"{name}:0"], task_limit=3)
        rows = guard.load(asked, 0).measure(model)
        found.append([dataclasses.replace(row, task="choice") for row in rows])
    task_scores.summarize(found[0], found[0])
    with pytest.raises(EvaluationError, match="other answers were right"):
        task_scores.summarize(found[1], found[0])


def test_without_lm_eval_the_error_says_what_to_install(tmp_path, tasks, monkeypatch):
    for name in ("guard", "adapter"):
        monkeypatch.delitem(sys.modules, f"selm_jax.evaluation.benchmarks.lm_eval.{name}")
    monkeypatch.delattr("selm_jax.evaluation.benchmarks.lm_eval.guard")
    monkeypatch.delattr("selm_jax.evaluation.benchmarks.lm_eval.adapter")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    run = Run(written(tmp_path, tasks), Console(quiet=True))
    with pytest.raises(EvaluationError, match=r"pip install 'selm_jax\[lm-eval\]'"):
        check(run)


def test_a_reward_model_has_no_tasks(tmp_path, tasks):
    changes = {
        "objective": {"loss": "bradley_terry"}, "data__chosen": "chosen",
        "data__rejected": "rejected",
        "candidates": {"greedy": 0, "samples": 0, "dataset": True},
    }  # fmt: skip
    file = experiment(tmp_path)
    for name in ("train", "heldout"):
        rows = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        text = "".join(
            json.dumps(row | {"chosen": "Yes.", "rejected": "No, never."}) + "\n" for row in rows
        )
        (tmp_path / f"{name}.jsonl").write_text(text)
    assert file.exists()
    run = Run(written(tmp_path, tasks, **changes), Console(quiet=True))
    with pytest.raises(RunError, match="trains a reward model, which answers no questions"):
        check(run)


def test_code_that_task_files_name_is_an_input_but_its_compiled_copies_are_not(run, tasks):
    before = run.data.tasks(None).digests("tasks")
    (tasks / "__pycache__").mkdir()
    (tasks / "__pycache__" / "mark.pyc").write_bytes(b"x")
    assert run.data.tasks(None).digests("tasks") == before
    (tasks / "mark.py").write_text(MARK)
    assert run.data.tasks(None).digests("tasks") != before
    (tasks / "mark.py").unlink()
