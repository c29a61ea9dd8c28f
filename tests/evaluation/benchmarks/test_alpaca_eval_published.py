"""The length-controlled rate from the repository's files, with made-up files of known truth."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from selm_jax.cli import app
from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.alpaca_eval import evaluate as alpaca
from selm_jax.evaluation.benchmarks.alpaca_eval import instructions as alpaca_eval_set
from selm_jax.evaluation.benchmarks.alpaca_eval import length_controlled as lc
from selm_jax.evaluation.benchmarks.alpaca_eval import published as repo
from selm_jax.evaluation.benchmarks.alpaca_eval.instructions import (
    BASELINE,
    Known,
    check_annotations,
    read_annotations,
)
from selm_jax.shell import artifacts

N = 120
REPOSITORY = "ALPACA_EVAL_REPOSITORY"  # names a clone, for the test that wants the real files


class World:
    """Instructions of known difficulty, what a repository would hold of them, and the rows of
    df_gamed.csv, which it does not hold."""

    def __init__(self, folder: Path, patch):
        pytest.importorskip("alpaca_eval.metrics")
        patch.setattr(lc, "_RESAMPLES", 100)
        rng = np.random.default_rng(0)
        self.folder = folder
        self.difficulty = rng.normal(0, 1, N)
        self.texts = [f"Question {i}?" for i in range(N)]
        base = ["a" * n for n in rng.integers(500, 3000, N)]
        self.known = Known.of(self.texts, base)
        patch.setattr(alpaca_eval_set, "published", lambda: self.known)
        patch.setattr(repo, "published", lambda: self.known)
        gamed, sums = [], np.zeros(2)
        outputs = {repo.OUTPUTS: base}
        for name, (low, high), file in (
            ("concise", (100, 600), repo.CONCISE), ("verbose", (2000, 5000), repo.VERBOSE)
        ):  # fmt: skip
            said = ["a" * n for n in rng.integers(low, high, N)]
            outputs[file] = said
            delta = np.array([len(a) - len(b) for a, b in zip(base, said, strict=True)], float)
            delta /= delta.std(ddof=1)
            y = 1 / (1 + np.exp(np.tanh(delta) - 0.3 * self.difficulty + 0.5 * rng.normal(size=N)))
            sums += [y @ np.tanh(delta), y @ self.difficulty]
            gamed += [
                {"model": f"{BASELINE}_{name}", "preference": y[i], "index": i,
                 "std_delta_len": delta[i], "instruction_difficulty": self.difficulty[i],
                 "not_gamed_baseline": False}
                for i in range(N)
            ]  # fmt: skip
        patch.setattr(repo, "SUMS", tuple(sums))
        self.gamed = folder / "df_gamed.csv"
        with self.gamed.open("w", newline="") as f:
            writer = csv.DictWriter(f, gamed[0])
            writer.writeheader()
            writer.writerows(gamed)
        win = rng.random(N) < 1 / (1 + np.exp(1.0 - self.difficulty))
        self.rows = [
            {
                "instruction": self.texts[i], "output_1": base[i], "generator_1": BASELINE,
                "output_2": "a" * int(rng.integers(300, 2500)), "generator_2": "mine",
                "annotator": "weighted_alpaca_eval_gpt4_turbo", "preference": 1.0 + win[i],
            }
            for i in range(N)
        ]  # fmt: skip
        psi, theta = 0.7, -2.2
        p = 1 / (1 + np.exp(-(theta + psi * self.difficulty)))
        fitted = [
            {"instruction": t, "glm_preference": round(float(x), 10)}
            for t, x in zip(self.texts, p, strict=True)
        ]
        self.stored = {repo._OF_FIT: (-1.5, psi, theta)}
        self.files = {repo.FITTED: fitted} | {
            file: [{"instruction": t, "output": o} for t, o in zip(self.texts, said, strict=True)]
            for file, said in outputs.items()
        }
        self.patch = patch

    def true_fit(self, c: float | None) -> lc.Fit:
        with lc.fitting(self.rows, range(N), self.gamed) as fit:
            return fit(c)

    def repository(self) -> Path:
        root = self.folder / "repository"
        for name, rows in self.files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(json.dumps(rows))
        weights = root / repo.WEIGHTS
        weights.parent.mkdir(parents=True, exist_ok=True)
        lines = [
            "," + ",".join("abc"),
            *(f"{m}," + ",".join(map(repr, w)) for m, w in self.stored.items()),
        ]
        weights.write_text("\n".join(lines) + "\n")
        found = {name: artifacts.digest(root / name) for name in repo.SHA256}
        self.patch.setattr(repo, "SHA256", found)
        return root


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


def test_difficulties_follow_from_a_stored_fit(world):
    found = repo.read(world.repository())
    np.testing.assert_allclose(found.difficulty, world.difficulty, atol=1e-8)


@pytest.mark.parametrize("c", [repo.CHOICES[5], repo.CHOICES[6], repo.CHOICES[9]])
def test_the_rate_is_that_of_the_true_file_at_the_published_c(world, c):
    fit = world.true_fit(c)
    world.stored["mine"] = fit.weights
    rows = check_annotations(world.rows, "here")
    found = alpaca.numbers(rows, published=world.repository())
    assert found["lc_c"] == pytest.approx(c)
    assert found["lc_c_from"] == "the published fit of mine"
    assert found["length_controlled_winrate"] == pytest.approx(fit.rate, abs=1e-4)
    assert found["lc_standard_error"] == pytest.approx(fit.spread, abs=1e-4)
    low, high = (found[f"length_controlled_winrate_{end}"] for end in ("low", "high"))
    assert low < fit.rate < high
    assert found["published_sha256"] == repo.SHA256


def test_a_model_without_a_stored_fit_has_the_usual_c(world):
    """A model without a fit, one of another judge, and one whose fit is of other annotations."""
    usual = world.true_fit(repo.USUAL_C).rate
    folder = world.repository()
    for changes, stored in (
        ({}, {}),
        ({"annotator": "weighted_llama"}, {"mine": world.true_fit(1e4).weights}),
        ({}, {"mine": (0.5, -0.5, 2.0)}),
    ):
        world.stored |= stored
        world.repository()
        rows = check_annotations([row | changes for row in world.rows], "here")
        found = alpaca.numbers(rows, published=folder)
        assert found["lc_c_from"] == "most published fits"
        assert found["length_controlled_winrate"] == pytest.approx(usual, abs=1e-4)


def test_an_absent_row_moves_no_other_instructions_difficulty(world):
    world.rows[40]["preference"] = None  # the package fits without it
    full = world.true_fit(repo.USUAL_C)
    gone = [row for i, row in enumerate(world.rows) if i != 40]
    rows = check_annotations(gone, "here", allow_missing=1)
    found = alpaca.numbers(rows, published=world.repository())
    assert found["missing"] == 1
    # It is left out of the standard deviation of lengths and of the mean, too.
    assert found["length_controlled_winrate"] == pytest.approx(full.rate, abs=0.3)
    with lc.fitting(rows, range(N - 1), world.gamed) as fit:  # as the leaderboard has it
        shifted = fit(repo.USUAL_C)
    assert shifted.weights[1] < 0.7 * full.weights[1] and abs(shifted.rate - full.rate) > 0.4


def test_the_verb(world, tmp_path):
    file = tmp_path / "annotations.json"
    file.write_text(json.dumps(world.rows))
    folder = world.repository()
    given = ["eval", "alpaca_eval", "--annotations", str(file), "--published", str(folder)]
    result = CliRunner().invoke(app, [*given, "-o", str(tmp_path / "out")])
    assert result.exit_code == 0 and "length-controlled" in result.output, result.output
    (record,) = (tmp_path / "out").glob("*/alpaca_eval.json")
    assert json.loads(record.read_text())["published_sha256"] == repo.SHA256
    result = CliRunner().invoke(app, [*given, "--gamed", "x.csv"])
    assert "give one of them" in str(result.exception)


@pytest.mark.parametrize("spoil", ["missing", "changed"])
def test_other_files_are_refused_by_name(world, spoil):
    folder = world.repository()
    file = folder / repo.VERBOSE
    if spoil == "missing":
        file.unlink()
    else:
        file.write_text(file.read_text().replace('"a', '"b', 1))
    rows = check_annotations(world.rows, "here")
    says = "verbose/model_outputs.json.*" + ("is not there" if spoil == "missing" else "SHA-256 is")
    with pytest.raises(EvaluationError, match=says):
        alpaca.numbers(rows, published=folder)


def test_sums_that_no_preferences_have(world):
    world.patch.setattr(repo, "SUMS", (1e6, 0.0))
    with pytest.raises(EvaluationError, match="do not reproduce the stored fits"):
        alpaca.numbers(check_annotations(world.rows, "here"), published=world.repository())


@pytest.mark.parametrize("name", ["gemma-2b-it", "FuseChat-Llama-3.2-1B-Instruct"])
def test_the_leaderboards_rates(shared, published, name):
    folder = os.environ.get(REPOSITORY)
    if folder is None:
        pytest.skip(f"${REPOSITORY} names no clone of AlpacaEval's repository")
    rows = read_annotations(shared / "alpaca_eval" / name / "annotations.json")
    found = alpaca.numbers(rows, published=Path(folder))
    with (shared / "alpaca_eval/leaderboard.csv").open() as f:
        line = next(row for row in csv.DictReader(f) if row[""] == name)
    rate = float(line["length_controlled_winrate"])
    assert found["length_controlled_winrate"] == pytest.approx(rate, abs=4e-7)
    low, high = (found[f"length_controlled_winrate_{end}"] for end in ("low", "high"))
    published(
        f"AlpacaEval 2, {name}", f"length-controlled {rate:.6f} [{low:.2f}, {high:.2f}]: equal"
    )
