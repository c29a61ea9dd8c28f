"""Sweeps: a grid of runs that share their work, go on after a kill, and end in one table."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import yaml
from forked import Selm
from rich.console import Console

from selm_jax import config
from selm_jax.commands import figures
from selm_jax.config import ConfigError
from selm_jax.iterate import iterate
from selm_jax.rollout.engine import Engine
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.shell.artifacts import Stages
from selm_jax.shell.shared_stages import SharedStages, key_of
from selm_jax.statistics.intervals import pooled
from selm_jax.sweep import SweepError, sweep, write
from selm_jax.sweep.grid import read_sweep
from selm_jax.sweep.table import shown, table
from selm_jax.tables.examples import read as read_examples
from selm_jax.text.conversations import Message

QUIET = Console(quiet=True)
GRID = {
    "method": {
        "dpo": {"objective": {"loss": "dpo", "beta": 0.1}},
        "alpha 10": {"objective.alpha": 10},
    }
}
# The first iteration of a run of two, alone.
ONE = {"iterations": 1, "training.learning_rate": [1e-3]}
SEEDS, CELLS = (1, 7), len(GRID["method"])
RUNS = len(SEEDS) * CELLS


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        tiny.on_first_device(patch)
        patch.delenv("XLA_FLAGS", raising=False)  # for the processes that tests start
        yield


@pytest.fixture(autouse=True, scope="module")
def compiled_once(tmp_path_factory):
    """As `selm` has it: what is compiled for one run is there for the next."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    for name, value in zip(names, (str(tmp_path_factory.mktemp("compiled")), 0.0), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in zip(names, before, strict=True):
        jax.config.update(name, value)


def sweep_file(folder: Path, **changes) -> Path:
    said = {
        "output": str(folder / "sweep"),
        "base": str(tiny.experiment(folder, data__portions=2)),
        "seeds": list(SEEDS),
        "grid": GRID,
        "baseline": {"method": "dpo"},
    } | changes
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump(said, sort_keys=False))
    return file


def count_generations(patch) -> Counter:
    """Responses by (seed, iteration) from now on; an evaluation's iteration is 0."""
    drawn, generate = Counter(), Engine.generate

    def counting(self, params, requests, *, seed, iteration, **rest):
        found = generate(self, params, requests, seed=seed, iteration=iteration, **rest)
        drawn[seed, iteration] += len(found)
        return found

    patch.setattr(Engine, "generate", counting)
    return drawn


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The plan of a finished sweep, and what was generated for it."""
    with pytest.MonkeyPatch.context() as patch:
        drawn = count_generations(patch)
        done = read_sweep(sweep_file(tmp_path_factory.mktemp("sweep")))
        sweep(done, QUIET)
    return done, drawn


def first_iteration(folder: Path) -> dict[str, bytes]:
    """What the runs of a folder computed until then: tables, and metrics but for times."""
    files = [*folder.rglob("iteration_[01]/**/*.parquet")]
    found = {str(f.relative_to(folder)): f.read_bytes() for f in files}
    for file in folder.rglob("metrics.jsonl"):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        kept = [
            {k: v for k, v in m.items() if not k.startswith(("time/", "memory/"))}
            for m in lines
            if m["iteration"] < 2
        ]
        found[str(file.relative_to(folder))] = json.dumps(kept).encode()
    return found


@pytest.mark.slow
def test_the_first_iterations_answers_are_generated_once_for_all_objectives(finished):
    _, drawn = finished
    train, heldout = 16 * 3, 8 * 2  # prompts, answers of each
    for seed in SEEDS:
        assert drawn[seed, 1] == train  # one policy, three objectives
        assert drawn[seed, 2] == CELLS * train  # three policies
        assert drawn[seed + 1, 0] == (1 + 2 * CELLS) * heldout  # the start once, then each policy
    assert len(drawn) == 3 * len(SEEDS)


@pytest.mark.slow
def test_ranks_and_reference_scores_are_shared_and_training_is_not(finished):
    done, _ = finished
    shared = Counter()
    for member in done.members:
        for folder in Path(member.experiment.output).glob("iteration_*"):
            for stage, entry in Stages(folder).read().items():
                shared[stage, "shared" in entry] += 1
    for stage in ("generate", "rank", "score"):
        assert shared[stage, True] == RUNS - len(SEEDS)
    assert shared["evaluate", True] == RUNS - len(SEEDS)
    assert shared["train", True] == shared["export", True] == 0
    assert shared["train", False] == 2 * RUNS


@pytest.mark.slow
def test_a_shared_run_is_what_it_would_have_been_alone(finished, tmp_path):
    done, _ = finished
    member = done.members[1]  # alpha 10, seed 1: it came after another
    alone = config.load(
        Path(member.experiment.output) / "config.yaml",
        [f"output={tmp_path / 'run'}", "iterations=1", "training.learning_rate=1e-3"],
    )
    iterate(Run(alone, QUIET))
    assert first_iteration(Path(member.experiment.output)) == first_iteration(tmp_path / "run")
    weights = "iteration_1/model/model.safetensors"
    shared = Path(member.experiment.output) / weights
    assert shared.read_bytes() == (tmp_path / "run" / weights).read_bytes()


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(finished, tmp_path, monkeypatch):
    done, _ = finished
    page = (done.folder / "report.html").read_bytes()
    before = {f: f.stat().st_mtime_ns for f in done.folder.rglob("*.parquet")}
    monkeypatch.setattr(Engine, "generate", None)
    sweep(dataclasses.replace(done, members=done.members[:1], folder=tmp_path), QUIET)
    assert before == {f: f.stat().st_mtime_ns for f in done.folder.rglob("*.parquet")}
    assert page == write(done).read_bytes()


@pytest.mark.slow
def test_the_table_holds_means_and_paired_differences_over_seeds_and_prompts(finished):
    done, _ = finished
    scores, trained = (
        {},
        {},
    )  # cell, seed -> greedy scores by prompt, of the last iteration; updates
    for member in done.members:
        rows = pq.read_table(Path(member.experiment.output) / "iteration_2/heldout.parquet")
        greedy = sorted(
            (r["prompt_id"], r["score"]) for r in rows.to_pylist() if r["kind"] == "greedy"
        )
        scores[member.cell.name, member.seed] = [score for _, score in greedy]
        trained[member.cell.name, member.seed] = Run(member.experiment).folder.logged("train", 1)
        trained[member.cell.name, member.seed] += Run(member.experiment).folder.logged("train", 2)
    rows = {row.name: row for row in table(done)}
    for name, row in rows.items():
        values = np.array([scores[name, seed] for seed in SEEDS])
        assert row.greedy.mean == pytest.approx(values.mean())
        lines = [line for s in SEEDS for line in trained[name, s]]
        assert row.seeds == len(SEEDS) and row.updates == len(lines) / len(SEEDS)
        assert row.ranked == 2 * 16 * 3  # equal queries
        if name == "dpo":
            assert row.baseline and row.difference is None and row.p_holm is None
            continue
        gaps = values - np.array([scores["dpo", seed] for seed in SEEDS])
        expected = pooled(gaps)
        assert (row.difference.mean, row.difference.low) == pytest.approx(
            (expected.mean, expected.low)
        )
        assert list(row.difference_by_seed.values()) == pytest.approx(list(gaps.mean(1)))
        assert row.p_holm >= row.difference.p
    assert rows["alpha 10"].difference.mean != 0
    with (done.folder / "table.csv").open() as f:
        lines = list(csv.DictReader(f))
    assert [line["cell"] for line in lines] == list(rows)
    assert float(lines[1]["difference_low"]) == rows["alpha 10"].difference.low
    assert lines[0]["difference_mean"] == ""


@pytest.mark.slow
def test_the_page_names_every_cell_and_links_every_run(finished):
    done, _ = finished
    text = (done.folder / "report.html").read_text()
    links = re.findall(r'href="([^"#:]+)"', text)
    assert len(links) == RUNS and all((done.folder / link).exists() for link in links)
    for cell in done.cells:
        assert cell.name in text
    assert f"{RUNS} of {RUNS} runs finished" in text and "not finished" not in text
    assert text.count('<svg class="plot"') == 3


@pytest.mark.slow
def test_the_papers_figures_of_its_runs(finished, tmp_path):
    done, _ = finished
    runs = [Run(member.experiment, QUIET) for member in done.members[: len(GRID["method"])]]
    files = figures.write(runs, tmp_path, console=QUIET)
    assert [f.name for f in files] == [
        "figure2_win_rates.svg",
        "figure3_rewards_by_run.svg",
        "figure3_rewards_by_iteration_dpo.svg",
        "figure3_rewards_by_iteration_alpha-10.svg",
        "figure6_one_change.svg",
        "figure5_own_samples.svg",
        "figure4_implicit_rewards.svg",
    ]
    for file in files:
        assert file.read_text().startswith("<?xml") and file.with_suffix(".csv").exists()
    with (tmp_path / "figure4_implicit_rewards.csv").open() as f:
        rows = list(csv.DictReader(f))
    # The pairs that both were trained on, scored again, the slow way: from what is stored.
    dpo, selm = runs
    examples = read_examples(dpo.folder.iteration(1) / "examples.parquet")
    assert len(rows) == 2 * len(examples)
    logps = [
        tiny.logps_of(run, run.programs.load(run.policy(1).path), examples) for run in (dpo, selm)
    ]
    for role in ("chosen", "rejected"):
        expected = {}
        for e, base, other in zip(examples, *logps, strict=True):
            expected[e.prompt_id] = 0.1 * (other[e.roles[role]] - base[e.roles[role]])
        mine = [row for row in rows if row["role"] == role]
        found = [float(row["difference"]) for row in mine]
        assert found == sorted(found)
        assert found == pytest.approx([expected[row["prompt_id"]] for row in mine], abs=1e-5)
        for row in mine:
            (e,) = (e for e in examples if e.prompt_id == row["prompt_id"])
            policy = logps[1][examples.index(e)][e.roles[role]]
            reward = 0.1 * (policy - e.reference_logps[e.roles[role]])
            assert float(row["reward"]) == pytest.approx(reward, abs=1e-5)


@pytest.mark.slow
def test_figures_need_pairs_that_all_runs_were_asked_about(finished, tmp_path):
    done, _ = finished
    (one, *_, other) = done.members  # dpo with one seed, alpha 10 with the other
    with pytest.raises(
        RunError, match="different pairs that iteration 1 was trained on. Name pairs"
    ):
        figures.write([Run(m.experiment, QUIET) for m in (one, other)], tmp_path, console=QUIET)
    rows = [
        {"prompt_id": f"x{i}", "prompt": p, "chosen": "Yes.", "rejected": "No."}
        for i, p in enumerate(tiny.PROMPTS[40:44])
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    runs = [Run(m.experiment, QUIET) for m in (one, other)]
    figures.write(runs, tmp_path / "out", pairs=str(pairs), console=QUIET)
    with (tmp_path / "out/figure4_implicit_rewards.csv").open() as f:
        assert {row["prompt_id"] for row in csv.DictReader(f)} == {"x0", "x1", "x2", "x3"}
    with pytest.raises(RunError, match="no figure could be drawn"):
        figures.write([], tmp_path / "nothing", console=QUIET)
    assert not (tmp_path / "nothing").exists()


def test_figure_4_asks_behind_the_experiments_system_message(tmp_path):
    rows = [
        {"prompt_id": "x", "prompt": "Which one?", "chosen": "This one.", "rejected": "That one."},
        {"prompt_id": "y", "prompt": "What now?", "chosen": "Go. " * 200, "rejected": "Stay."},
    ]
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run(config.load(tiny.experiment(tmp_path), ["data.system=Be brief."]), QUIET)
    _, (one,) = figures._examples(run, str(pairs))  # the other one fits no row
    messages = (Message("system", "Be brief."), Message("user", "Which one?"))
    assert one.prompt == run.chat.prompt_ids(messages)


class Stop(Exception):
    """Not ours, so the sweep ends where it is."""


@pytest.mark.slow
def test_a_sweep_that_was_stopped_goes_on_to_the_same_bytes(finished, tmp_path, monkeypatch):
    done, _ = finished
    file = sweep_file(tmp_path, seeds=[SEEDS[0]], set=ONE)
    put, puts = SharedStages.put, []

    def stopping(self, key, *rest):
        puts.append(key)
        if len(puts) == 3:  # after a stage's work, before anybody knows of it
            raise Stop
        put(self, key, *rest)

    monkeypatch.setattr(SharedStages, "put", stopping)
    with pytest.raises(Stop):
        sweep(read_sweep(file), QUIET)
    sweep(read_sweep(file), QUIET)
    mine = first_iteration(tmp_path / "sweep")
    theirs = first_iteration(done.folder)
    assert mine == {name: data for name, data in theirs.items() if f"seed_{SEEDS[0]}/" in name}
    # Of each run its metrics, two tables of held-out answers, three parts, and two more tables.
    assert len(mine) == CELLS * (1 + 2 + 3 + 2)


@pytest.mark.slow
def test_failures_are_named_and_only_like_is_compared_with_like(tmp_path):
    """One run has only ties, which shows when it is ranked; another one has another ranker."""
    grid = {
        "change": {
            "nothing": {},
            "ranker": {"feedback.ranker": "sentiment", "feedback.ties": "first"},
            "batch": {"feedback.ranker": "sentiment"},
        }
    }
    file = sweep_file(tmp_path, grid=grid, baseline=None, seeds=[1], set=ONE)
    named = "(?s)1 of 3 runs failed.*batch, seed 1: .*fewer than one batch"
    with pytest.raises(SweepError, match=named):
        sweep(read_sweep(file), QUIET)
    nothing, ranker, batch = table(read_sweep(file))
    assert nothing.seeds == ranker.seeds == 1
    assert nothing.greedy is not None and ranker.greedy is not None
    assert ranker.difference is None  # another meaning of reward
    assert batch.seeds == 0 and batch.greedy is None and batch.difference is None
    text = (tmp_path / "sweep/report.html").read_text()
    assert "Could not be finished" in text and "2 of 3 runs finished" in text


@pytest.mark.slow
def test_one_seed_is_said_to_be_one_and_others_can_be_named(tmp_path):
    file = sweep_file(tmp_path, set=ONE)
    few, more = read_sweep(file, seeds=[7]), read_sweep(file)
    assert few.command.endswith("--seeds 7") and "--seeds" not in more.command
    sweep(few, QUIET)
    assert table(few)[1].difference.seeds == 1
    text = (tmp_path / "sweep/report.html").read_text()
    assert "another seed may not show" in text and "for other seeds and prompts too" not in text
    sweep(more, QUIET)
    assert table(more)[1].difference.seeds == 2
    text = (tmp_path / "sweep/report.html").read_text()
    assert "for other seeds and prompts too" in text


@pytest.mark.slow
def test_what_only_the_first_process_is_refused_fails_in_both(tmp_path):
    """Two processes; the first alone builds rankers. Neither trains the setting that could run."""
    grid = {
        "change": {
            "judge": {"feedback.ranker": "judge", "feedback.settings": {"model": "nobody"}},
            "nothing": {},
        }
    }
    file = sweep_file(tmp_path, grid=grid, baseline=None, seeds=[1], set=ONE)
    both = Selm(
        ["sweep", file], folder=tmp_path, cache=tmp_path / "cache", processes=2,
        log=tmp_path / "log",
    )  # fmt: skip
    assert both.wait() == [1, 1], both.output()
    refused, also = (log.read_text() for log in both.logs)
    assert "1 of 2 settings cannot run" in refused and "judge: judge: no server" in refused
    assert "judge: process 0 failed: " in also
    assert not list((tmp_path / "sweep").rglob("stage.json"))


WRONG = {
    "loss": ({"objective.loss": "selmm"}, "selmm"),
    "ranker": ({"feedback.ranker": "lenght"}, "lenght"),
    "data": ({"data.train": "nowhere.jsonl"}, "nowhere.jsonl"),
    "batch": ({"training.global_batch": 1000}, "fewer than one batch"),
}


@pytest.mark.parametrize("changes, why", WRONG.values(), ids=WRONG.keys())
def test_a_mistake_in_the_last_cell_is_found_before_the_first_one_trains(
    changes, why, tmp_path, monkeypatch
):
    grid = {"change": {"nothing": {}, "wrong": changes}}
    file = sweep_file(tmp_path, grid=grid, baseline=None, seeds=[1, 2], set=ONE)
    monkeypatch.setattr("selm_jax.sweep.iterate", None)
    with pytest.raises(SweepError, match=f"(?s)1 of 2 settings cannot run.*\n  wrong: .*{why}"):
        sweep(read_sweep(file), QUIET)


def test_base_starts_at_the_sweep_files_own_folder(tmp_path, monkeypatch):
    (tmp_path / "sweeps").mkdir()
    (tmp_path / "elsewhere").mkdir()
    tiny.experiment(tmp_path)
    file = sweep_file(tmp_path, base="../experiment.yaml").rename(tmp_path / "sweeps/sweep.yaml")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert len(read_sweep(file).members) == RUNS
    assert len(read_sweep(file, base="../experiment.yaml").members) == RUNS  # the command line's
    file.write_text(file.read_text().replace("../experiment.yaml", "experiment.yaml"))
    with pytest.raises(ConfigError, match="experiment.yaml: no such experiment file"):
        read_sweep(file)
    monkeypatch.chdir(tmp_path)  # where earlier versions looked
    with pytest.raises(ConfigError, match=r"own folder.*Write `base: \.\./experiment.yaml`"):
        read_sweep(file)


@pytest.mark.slow
def test_it_ends_with_its_table(finished, capsys):
    done, _ = finished
    for width in (60, 120):
        console = Console(width=width, markup=False)
        console.print(shown(table(done), done))
        told = capsys.readouterr().out
        words = " ".join(told.split())
        assert max(map(len, told.splitlines())) <= width
        assert "against dpo" in words and "baseline" in words and "alpha 10" in words
        row = table(done)[1]
        assert f"{row.greedy.mean:.3f}" in told and f"{row.difference.mean:.3f}" in told


def test_a_store_never_hands_out_what_was_damaged(tmp_path):
    store, out = SharedStages(tmp_path / "store"), tmp_path / "out.txt"
    out.write_text("right")
    key = key_of(stage="x", settings={"a": 1})
    assert key != key_of(stage="x", settings={"a": 2}) and store.take(key, tmp_path / "to") is None
    store.put(key, {"out.txt": out}, {"counts": 3})
    out.unlink()
    assert store.take(key, tmp_path / "to") == {"counts": 3}
    assert (tmp_path / "to/out.txt").read_text() == "right"
    (tmp_path / "store" / key / "out.txt").write_text("wrong!")
    assert store.take(key, tmp_path / "third") is None
    assert not (tmp_path / "third").exists() and not (tmp_path / "store" / key).exists()


BAD = {
    "unknown axis in the baseline": ({"baseline": {"metod": "dpo"}}, "baseline metod: dpo is not"),
    "unknown level": ({"baseline": {"method": "ppo"}}, "method: dpo, alpha 10"),
    "unknown key": ({"grd": {}}, "grd: "),
    "unknown setting": (
        {"grid": {"training.global_bach": [4]}}, r"(?s)cell 4.*did you mean 'global_batch'"
    ),
    "no axis": ({"grid": {}}, "grid has no axis"),
    "an axis without levels": ({"grid": {"seeds": {}}}, "axis seeds has no levels"),
    "the same twice": (
        {"grid": {"method": {"a": {}, "b": {}}}}, "'a, seed 1' and 'b, seed 1' have the same"
    ),
    "one folder twice": ({"grid": {"x": {"a b": {}, "a/b": {"iterations": 1}}}}, "the same folder"),
    "seeds in the grid": ({"grid": {"seed": [1, 2]}}, "List seeds in `seeds` instead"),
    "no such base": ({"base": "nowhere.yaml"}, "no such experiment file"),
}  # fmt: skip


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD.keys())
def test_a_file_that_says_nothing_sensible_is_refused_before_any_work(changes, message, tmp_path):
    if "grid" in changes:
        changes = {"baseline": None} | changes
    if "iterations" in str(changes):
        changes |= {"set": {"training.learning_rate": 1e-3}}
    with pytest.raises(ConfigError, match=message):
        read_sweep(sweep_file(tmp_path, **changes))
    assert not (tmp_path / "sweep").exists()


def test_overrides_are_for_every_run_and_cells_come_after_them(tmp_path):
    file = sweep_file(tmp_path, grid={"objective.alpha": [0, 0.5]}, baseline=None)
    found = read_sweep(
        file, ["objective.beta=0.7", "objective.alpha=9"], output=str(tmp_path / "else")
    )
    assert {m.experiment.objective["beta"] for m in found.members} == {0.7}
    assert [m.experiment.objective["alpha"] for m in found.members] == [0, 0.5, 0, 0.5]
    assert [m.seed for m in found.members] == [1, 1, 7, 7]
    assert (found.axis, found.baseline) == ("objective.alpha", "0")
    assert found.members[3].experiment.output == str(tmp_path / "else/0.5/seed_7")


def test_texts_of_a_sweep_arrive_as_they_are_written(tmp_path):
    text = '😀 café \u2028 \u0085 # 1: "yes" \\ud83d \x7f'
    file = sweep_file(
        tmp_path, set={"data.system": text}, baseline=None,
        grid={"x": {"a": {"text.template": {"name": f"a {text}"}}, "b": {"text.template": {}}}},
    )  # fmt: skip
    found = read_sweep(file, ["data.prompt=yes"])
    assert {m.experiment.data.system for m in found.members} == {text}
    assert found.members[0].experiment.text.template == {"name": f"a {text}"}
    assert {m.experiment.data.prompt for m in found.members} == {"yes"}


def test_mistakes_of_a_sweep_name_their_line(tmp_path):
    file = sweep_file(tmp_path, seeds=[1, -1])
    with pytest.raises(ConfigError, match=r"line \d+: seeds.1: -1, a whole number from 0 to"):
        read_sweep(file)
    file.write_text(file.read_text() + "seeds: [1]\n")
    with pytest.raises(ConfigError, match=r"lines \d+ and \d+: the key seeds is given twice"):
        read_sweep(file)


@pytest.mark.slow
def test_killed_with_signal_9_and_started_again(finished, tmp_path):
    done, _ = finished
    file = sweep_file(tmp_path, seeds=[SEEDS[0]], set=ONE)
    command = [sys.executable, "-m", "selm_jax", "sweep", str(file)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    watched = tmp_path / "sweep"

    def is_there(name: str) -> bool:  # by os.walk, which takes it that folders come and go
        return any(name in (*folders, *files) for _, folders, files in os.walk(watched))

    for stage in ("responses", "checkpoints", "alpha-10"):  # killed while this is being made
        process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        while process.poll() is None and not is_there(stage):
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
    theirs = first_iteration(done.folder)
    expected = {n: data for n, data in theirs.items() if f"seed_{SEEDS[0]}/" in n}
    assert first_iteration(watched) == expected
