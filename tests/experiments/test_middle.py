"""The middle world: its optimum is the optimum, it mirrors the laboratory, and its files run."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from experiments.middle import language, make, results
from selm_jax.config import load
from selm_jax.iterate import iterate
from selm_jax.lab import worlds
from selm_jax.preferences.candidates import Candidate, Pair
from selm_jax.run.check import check
from selm_jax.run.run import Run
from selm_jax.sweep import sweep
from selm_jax.sweep.grid import read_sweep
from selm_jax.tables import heldout

MIDDLE = Path(__file__).parents[2] / "experiments" / "middle"
LANDSCAPES = pytest.mark.parametrize("landscape", language.LANDSCAPES)


@LANDSCAPES
@pytest.mark.parametrize("length", [1, 2])
def test_of_all_answers_the_best_are_those_in_the_opposite_dialect(landscape, length):
    asked = language.Instruction(length, "music", "ada", "cor")
    everything = list(itertools.product(language.meanings(), repeat=length))
    rewards = np.array([language.reward(landscape, asked, " ".join(each)) for each in everything])
    assert rewards.max() == 1
    opposite = (2 * language.TOWNS.index("cor") + 8) % 16
    best = {each for each, r in zip(everything, rewards, strict=True) if r == 1}
    assert best == set(itertools.product(language.words(opposite, "music"), repeat=length))


@LANDSCAPES
def test_the_optimum_with_the_penalty_is_that_of_all_listed_answers(landscape):
    """The speakers' answers are listed with their probabilities; the best policy follows."""
    asked = language.Instruction(2, "rain", "ben", "gal")
    town = language.TOWNS.index("gal")
    total, best_policy = 0.0, []
    for dialect, likely in enumerate(language.habits()[town]):
        for each in itertools.product(language.words(dialect, "rain"), repeat=2):
            p, r = likely / 4**2, language.reward(landscape, asked, " ".join(each))
            total += p
            best_policy.append((p, r))
    p, r = np.array(best_policy).T
    assert total == pytest.approx(1)
    policy = p * np.exp(r / language.BETA)
    policy /= policy.sum()
    value = policy @ r - language.BETA * policy @ np.log(policy / p)
    assert value == pytest.approx(language.best_value(landscape)[town])


def test_coverage_and_heights_are_those_of_the_laboratory():
    at, centres = jnp.arange(16) / 16, jnp.arange(8)[:, None] / 8
    tables = worlds.landscapes(jax.random.key(0), at, centres)
    for landscape in language.LANDSCAPES:
        theirs = tables[worlds.LANDSCAPES.index(landscape)]
        np.testing.assert_allclose(language.heights(landscape), theirs, atol=1e-6)
    habits, far = language.habits(), language.heights("needle") == 1
    np.testing.assert_allclose(habits.sum(-1), 1)
    assert (far.sum(-1) == 1).all() and np.allclose(habits[far], language.COVERAGE)


def test_an_answer_is_as_good_as_its_worst_word_and_must_be_what_was_asked():
    asked = language.read("say three words about bread to ada of arn")
    assert asked == language.Instruction(3, "bread", "ada", "arn")
    far, own = language.words(8, "bread")[0], language.words(0, "bread")[0]
    two_peaks = {
        f"{far} {far} {far}": 1.0, f"{own} {own} {own}": 0.6, f"{far} {own} {far}": 0.6,
        f"{far} {far}": 0.0, f"{far} {far} {far} {far}": 0.0, f"{far} {far} nothing": 0.0,
        f"{far} {far} {language.words(8, 'rain')[0]}": 0.0, "": 0.0,
    }  # fmt: skip
    for said, height in two_peaks.items():
        assert language.reward("two_peaks", asked, said) == pytest.approx(height), said
        assert language.reward("needle", asked, said) == (height == 1)


def test_the_data_are_drawn_from_their_seed_and_from_the_towns_habits(monkeypatch):
    monkeypatch.setattr(make, "SPEAKERS", 3000)
    one, again, other = (make.rows(seed) for seed in (0, 0, 1))
    assert one == again and one["train"] != other["train"]
    asked = {name: {row["prompt"] for row in rows} for name, rows in one.items()}
    assert not asked["heldout"] & (asked["train"] | asked["speakers"])
    assert len(asked["heldout"] | asked["train"]) == len(language.instructions())
    for name, role, share in (
        ("speakers", "chosen", language.COVERAGE),
        ("train", "rejected", 1 / 16),
    ):
        said = [(language.read(row["prompt"]), row[role][-1]["content"]) for row in one[name]]
        hits = np.mean([language.reward("needle", *each) for each in said])
        assert abs(hits - share) < 3 * (share / len(said)) ** 0.5


def test_pairs_are_policy_against_speaker_or_the_best_and_worst_of_four():
    def candidates(*sources):
        return [Candidate(source, f"{i}", (i,), "stop", i) for i, source in enumerate(sources)]

    rng = np.random.default_rng(0)
    one = candidates("sample", "chosen", "rejected")
    for scores, pair in (([0, 1, 9], (1, 0)), ([1, 0, 9], (0, 1)), ([1, 1, 9], (0, 1))):
        assert language.with_reference(one, np.array(scores), rng) == Pair(*pair)
    assert (language.reference(one, np.zeros(3), rng), language.uniform(one, np.zeros(3), rng)) == (
        1, 2,
    )  # fmt: skip
    four = candidates("sample", "sample", "sample", "chosen", "rejected")
    assert language.best_of_4(four, np.array([0.3, 0.5, 0.2, 0.4, 9]), rng) == Pair(1, 2)
    assert language.best_of_4(four, np.array([0, 0, 0, 0, 9]), rng) == Pair(0, 3)  # a tie


@LANDSCAPES
def test_each_arm_changes_one_thing_and_has_a_prediction(landscape, monkeypatch):
    monkeypatch.chdir(MIDDLE.parents[1])
    grid = read_sweep(MIDDLE / f"{landscape}.yaml")
    seeds = {m.seed for m in grid.members}
    assert len(grid.members) == len(seeds) * 8 and len(seeds) == 16
    assert [cell.name for cell in grid.cells] == [results.BASELINE, *results.IN_LAB]
    base = grid.members[0].experiment
    assert base.feedback.ranker.endswith(f":{landscape}") and base.iterations == 3
    for (_, method), lab in results.predictions().items():
        assert lab["condition"] == "base" and method in results.IN_LAB
    for m in grid.members[1:8]:
        changed = {
            key
            for key in ("objective", "feedback", "candidates", "training", "rollout", "data")
            if getattr(m.experiment, key) != getattr(base, key)
        }
        assert changed <= {"objective", "feedback"} or m.cell.name == "best_of_4"


def test_verdicts_and_tables_say_what_the_records_hold():
    rng = np.random.default_rng(0)
    shifts = {"best_of_4": -0.5, "selm": 0.5}
    of_seed = rng.normal(1, 0.1, 16)

    def regret(method: str, seed: int) -> list[float]:  # the first number is the start model's
        return [9, of_seed[seed] + 0.01 * rng.normal() + shifts.get(method, 0)]

    others = {"reward": [0, 0], "kl": [0, 1], "greedy": [0, 1]}
    records = [
        {"landscape": place, "method": method, "seed": s, "regret": regret(method, s)} | others
        for place in language.LANDSCAPES
        for method in (results.BASELINE, *results.IN_LAB)
        for s in range(16)
    ]
    found = {(r["landscape"], r["method"]): r for r in results.compare(records)}
    assert found["needle", "selm"]["difference"] == pytest.approx(0.5, abs=0.02)
    lines = {line.split("`")[1]: line for line in results.table(list(found.values()), "needle")
             if "`" in line}  # fmt: skip
    assert lines["best_of_4"].endswith("| held |") and lines["selm"].endswith("| contradicted |")
    assert lines["vpo"].endswith("| not seen |") and "no clear difference" in lines["vpo"]
    told = next(results.summary(records, list(found.values())))
    assert told.startswith("256 runs: 8 methods with the same seeds, 16 in `needle` and 16 in")
    assert told.endswith(
        "predicts a difference in 10 cases: it was found in 2, was not seen in 7, and was "
        "contradicted in 1. It predicts no clear difference in 4 cases, and a clear one was found "
        "in 1 of them."
    )
    other = "".join(results.table(list(found.values()), "two_peaks"))
    assert other.count("| not contradicted |") == 3 and other.count("| contradicted |") == 1


@pytest.mark.slow
def test_a_start_model_learns_the_language_and_two_runs_go_through(tmp_path, monkeypatch):
    """The whole path at a smaller size: start model, preview's checks, two members of a sweep."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(make, "SIZES", make.SIZES | {"num_hidden_layers": 2})
    make.make(make.FOLDER)
    quiet = Console(quiet=True)
    one = ("compute.preset", "single")
    small = [one, ("data.limit", 2048), ("training.epochs", 3), ("evaluation.samples", 2)]
    iterate(Run(load(MIDDLE / "start.yaml", small), quiet))
    lines = Path("runs/middle/start/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    told = [json.loads(line) for line in lines]
    losses = [line["loss"] for line in told if "loss" in line]
    vocabulary = len(make.SPECIAL) + len(language.vocabulary())
    assert losses[0] > 0.9 * np.log(vocabulary) and losses[-1] < 0.6 * losses[0]
    changes = [
        "compute.preset=single",
        "data.limit=48",
        "data.heldout_limit=8",
        "iterations=1",
        "evaluation.samples=1",
    ]
    grid = read_sweep(MIDDLE / "two_peaks.yaml", changes, seeds=[1])
    for m in grid.members:
        check(Run(m.experiment, quiet))
    two = dataclasses.replace(grid, members=(grid.members[0], grid.members[7]))
    sweep(two, quiet)
    for m in two.members:
        assert heldout.read(Path(m.experiment.output) / "iteration_1" / "heldout.parquet")
        found = results.record("two_peaks", m)
        assert len(found["regret"]) == 2 and all(r > 0 for r in found["regret"])
