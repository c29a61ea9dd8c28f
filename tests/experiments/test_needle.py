"""The needle in SmolLM2: coverage and values are exact, draws stable, the files valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny import make_model

from experiments.needle import make, oracle, results
from selm_jax.evaluation.model import open_model
from selm_jax.parallel.mesh import make_mesh
from selm_jax.preferences.examples import Example
from selm_jax.run.data import Data
from selm_jax.run.inputs import digests_of
from selm_jax.run.task import task_of
from selm_jax.shell import artifacts
from selm_jax.sweep.grid import read_sweep
from selm_jax.text.chat import Message

ROOT = Path(__file__).parents[2]


@pytest.fixture
def model(tmp_path_factory):
    """A random model; its tokens are single bytes."""
    folder = make_model(tmp_path_factory.mktemp("needle") / "tiny-model")
    return open_model(str(folder), console=Console(quiet=True))


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    first = jax.devices()[:1]
    monkeypatch.setattr(
        "selm_jax.evaluation.model.make_mesh", lambda sizes: make_mesh(sizes, first)
    )


@pytest.fixture
def letters(monkeypatch):
    """Single letters may be openings, and a nearly uniform distribution has openings."""
    monkeypatch.setattr(oracle, "WORD", oracle.re.compile("[A-Za-z]"))
    monkeypatch.setattr(oracle, "SMALLEST", 0.001)


def distribution(seed: int, vocab: int = 400) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.full(vocab, 0.2))


@pytest.mark.parametrize("seed", range(20))
def test_openings_have_a_probability_of_a_twentieth_and_are_not_obvious(seed):
    likely, words = distribution(seed), np.arange(0, 400, 2)
    drawn = oracle.hide(likely, words, np.random.default_rng(seed))
    assert len(set(drawn)) == len(drawn) and set(drawn) <= set(words)
    assert likely[drawn].sum() == pytest.approx(oracle.COVERAGE, rel=0.05)
    # The tokens that are likelier than an opening have half of the probability or more.
    assert all(likely[likely > likely[t]].sum() >= oracle.OBVIOUS for t in drawn)
    assert drawn == oracle.hide(likely, words, np.random.default_rng(seed))
    others = [oracle.hide(likely, words, np.random.default_rng(s)) for s in range(50, 55)]
    assert any(set(each) != set(drawn) for each in others)


def test_too_few_words_are_refused():
    with pytest.raises(ValueError, match="expected 0.05"):
        oracle.hide(distribution(0), np.array([], int), np.random.default_rng(0))


def test_a_value_is_that_of_all_first_tokens_listed_one_by_one(model):
    """Their log-probabilities come from the scorer, as answers of one token."""
    asked = [[Message("user", text)] for text in ("Hi", "Describe a long river.")]
    start = np.stack([distribution(s, model.config.vocab_size) for s in (1, 2)])
    openings = [[3, 70], [5]]
    likely = oracle.first_tokens(model, asked)
    fast = oracle.value(likely, start, openings)
    every = tuple((t,) for t in range(model.config.vocab_size))
    for i, prompt in enumerate(model.prompt_ids(asked)):
        (logps,) = model.logps([Example("p", prompt, every, {})])
        slow = 0.0
        for token, logp in enumerate(logps):
            reward = float(token in openings[i])
            slow += np.exp(logp) * (reward - oracle.BETA * (logp - np.log(start[i, token])))
        assert fast[i] == pytest.approx(slow, abs=1e-5)


def test_the_optimum_is_the_value_of_the_best_policy():
    start, openings = distribution(3)[None], [[1, 8, 90]]
    reward = np.isin(np.arange(400), openings[0])
    best = start * np.exp(reward / oracle.BETA)
    best /= best.sum()
    optimum = oracle.best_value(oracle.hits(start, openings))
    assert oracle.value(best, start, openings) == pytest.approx(optimum)
    for seed in range(20):
        other = 0.9 * best + 0.1 * distribution(seed)[None]
        assert oracle.value(other, start, openings) < optimum
    assert oracle.value(start, start, openings) == pytest.approx(oracle.hits(start, openings))


def test_inputs_are_the_same_every_time_and_the_ranker_reads_them(
    model, letters, tmp_path, monkeypatch
):
    for name in ("a", "b"):
        make.make(tmp_path / name, str(model.folder.path))
    one, other = ({f.name: f.read_bytes() for f in (tmp_path / n).iterdir()} for n in ("a", "b"))
    assert one == other and len(one) == 4
    facts = json.loads(one["openings.json"])
    for tokens in facts["openings"].values():
        assert sum(tokens.values()) == pytest.approx(oracle.COVERAGE, rel=0.05)
    rows = [json.loads(line) for line in one["heldout.jsonl"].splitlines()]
    assert {row["category"] for row in rows} == set(oracle.CLASSES)
    monkeypatch.setattr(oracle, "FOLDER", tmp_path / "a")
    row = rows[0]
    assert row["openings"] == list(facts["openings"][row["category"]])
    hit, miss = row["openings"][0], "?"
    for said, reward in ((f"{hit}ello", 1), (f"{miss}{hit}", 0), (f" {hit}", 0), ("", 0)):
        assert oracle.opening("", said, row) == reward, said


def test_each_arm_changes_one_thing(monkeypatch):
    monkeypatch.chdir(ROOT)
    grid = read_sweep(ROOT / "experiments/needle/sweep.yaml")
    assert [cell.name for cell in grid.cells] == list(results.METHODS)
    assert [m.seed for m in grid.members] == [s for s in range(5) for _ in range(3)]
    dpo, geb, best_of_4 = (m.experiment for m in grid.members[:3])
    assert dpo.candidates == geb.candidates and dpo.objective != geb.objective
    assert dpo.objective == best_of_4.objective and best_of_4.candidates.samples == 4


class Counted:
    """Stands in for `Measure`: it counts the runs that are measured."""

    measured: ClassVar[list[tuple[str, int]]] = []

    def of_run(self, member):
        self.measured.append((member.cell.name, member.seed))
        named = {"method": member.cell.name, "seed": member.seed}
        return named | results.digests_of(member.folder) | {"regret": [1.0]}


@pytest.fixture
def members(tmp_path, monkeypatch):
    """The sweep's runs of seed 0, with inputs and runs in a temporary folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "Measure", Counted)
    monkeypatch.setattr(Counted, "measured", [])
    hide(tmp_path, "This")
    return read_sweep(ROOT / "experiments/needle/sweep.yaml", seeds=[0]).members


def hide(folder: Path, opening: str) -> None:
    inputs = folder / oracle.FOLDER
    inputs.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt_id": f"p{i}", "prompt": f"Tell me {i}.", "openings": [opening]} for i in range(44)
    ]
    (inputs / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def finish(member, experiment: str = "e0") -> None:
    """Writes what a finished run has in its folder, as far as it is read."""
    data = Data(member.experiment, task_of(member.experiment.objective), None)
    for t, stage in ((1, "generate"), (3, "export")):
        (member.folder / f"iteration_{t}").mkdir(parents=True, exist_ok=True)
        inputs = digests_of({"prompts": data.prompts(t)})
        artifacts.Stages(member.folder / f"iteration_{t}").finish(stage, inputs, {}, {}, {}, 0.0)
    artifacts.write_sealed(member.folder / "manifest.json", {"config_sha256": experiment})


def test_a_run_is_measured_once_and_again_if_its_digests_are_others(members, tmp_path):
    finish(members[0])
    finish(members[1])
    records = results.read_runs(members)
    assert Counted.measured == [("dpo", 0), ("geb", 0)]
    assert len({r["openings"] for r in records}) == 1 and records[0]["experiment"] == "e0"
    assert results.read_runs(members, records) == records and len(Counted.measured) == 2

    finish(members[0], experiment="e1")
    records = results.read_runs(members, records)
    assert Counted.measured[2:] == [("dpo", 0)] and records[0]["experiment"] == "e1"

    hide(tmp_path, "Imagine")  # both runs are made again with other openings
    finish(members[0])
    finish(members[1])
    again = results.read_runs(members, records)
    assert Counted.measured[3:] == [("dpo", 0), ("geb", 0)]
    assert {r["openings"] for r in again}.isdisjoint(r["openings"] for r in records)


def test_records_and_runs_of_other_openings_are_refused(members, tmp_path):
    finish(members[0])
    (record,) = results.read_runs(members)
    kept = record | {"method": "geb", "experiment": None}  # its run is not here
    assert results.read_runs(members, [kept])[1] == kept
    undigested = {k: v for k, v in kept.items() if k != "openings"}
    for other in (kept | {"openings": "0" * 64}, undigested):
        with pytest.raises(ValueError, match=r"record of geb, seed 0, in .*needle.json, belongs"):
            results.read_runs(members, [other])
    hide(tmp_path, "Imagine")
    with pytest.raises(ValueError, match=r"run of dpo, seed 0, in .*seed_0, belongs to other"):
        results.read_runs(members, [record])
    assert Counted.measured == [("dpo", 0), ("dpo", 0)]


def test_each_record_of_the_document_names_its_openings():
    records = json.loads(results.RECORDS.read_text(encoding="utf-8"))
    assert all(len(r["openings"]) == 64 and "experiment" in r for r in records)
    of_seed = {(r["seed"], r["openings"]) for r in records}
    assert len(of_seed) == len({r["seed"] for r in records})  # each seed has its own prompts


def test_tables_compare_the_seeds_that_all_methods_have():
    rng = np.random.default_rng(0)
    shifts = {"dpo": 0, "geb": 0.5, "best_of_4": -0.5}
    records = [
        {
            "method": method, "seed": seed, "regret": [9, 1 + seed + shift + 0.01 * rng.normal()],
            "reward": [0, 0.1], "kl_first": [0, 1 + seed], "told": [None, 0.25],
        }
        for method, shift in shifts.items() for seed in range(5)
    ]  # fmt: skip
    incomplete = records + [records[0] | {"seed": 5}]
    assert results.paired(incomplete) == records
    lines = list(results.found(records))[2:]
    assert lines[0].startswith("| `geb` | 5 | less | more |") and lines[0].endswith(
        "contradicted |"
    )
    assert lines[1].startswith("| `best_of_4` | 5 | less | less |") and lines[1].endswith("held |")
    shown = list(results.levels(records))[2:]
    assert shown[0].startswith("| `dpo`, seed 0 | 1.00") and shown[0].endswith("| 25 % |")
    assert len(shown) == 15 + 3 and shown[-1].startswith("| `best_of_4`, mean of 5 seeds | 2.")
    one = [r for r in records if r["seed"] == 0]
    assert "all methods have run with 1 seed only" in "".join(results.found(one))
    assert len(list(results.levels(one))) == 2 + 3
