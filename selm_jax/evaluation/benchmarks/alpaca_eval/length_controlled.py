"""AlpacaEval's length-controlled win rate: the package's own fit, and how sure it is.

The fit is a logistic regression of the preferences on the difference in length, the difficulty of
the instruction and the model, steadied by annotations of a baseline made concise and verbose
(`df_gamed.csv`, or what `alpaca_eval_published` makes of it). The rate is the mean of what it
predicts at equal length.

The package's `lc_standard_error` is the spread of these predictions over instructions, divided by
sqrt(805): not how far the rate would move if other instructions were drawn, which is 1.8 to 6 times
as much. The interval here is. Instructions are drawn anew, each with its annotation, and the fit is
made anew for each draw; its standard error gives an interval as `proportions` has it, which is no
point where everything is lost.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.alpaca_eval.instructions import data_file
from selm_jax.evaluation.benchmarks.alpaca_eval.score import package, wins
from selm_jax.evaluation.benchmarks.files import Row
from selm_jax.shell import artifacts
from selm_jax.statistics import proportions

GAMED_FILE = "df_gamed.csv"
# As two other projects pin it at `HUB_REVISION`.
GAMED_SHA256 = "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d"
_GAMED_COLUMNS = {
    "model", "preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline",
}  # fmt: skip
_FITTED = ("preference", "output_1", "output_2", "generator_1", "generator_2", "annotator")
_STEADY = 0.1  # the weight of a gamed annotation
_RESAMPLES = 1000
_DRAW = 100  # resamples that are fitted together

Weights = Float[np.ndarray, "fits 3"]  # of length, of difficulty, and of the model


def gamed_file(given: str | None, sha256: str | None = None) -> Path:
    """`df_gamed.csv`, its bytes checked.

    Args:
        given: see `alpaca_eval_set.data_file`.
        sha256: in hex, what to expect in place of the published file.

    Raises:
        EvaluationError: it is not there, or another file.
    """
    file = data_file(GAMED_FILE, given, "--gamed")
    expected = (sha256 or GAMED_SHA256).lower()
    found = artifacts.digest(file)
    if found != expected:
        raise EvaluationError(
            f"{file}: its SHA-256 is {found}; expected {expected}. With another file the "
            "length-controlled win rate is not the leaderboard's. If it is the one you mean, say so "
            f"with --gamed-sha256 {found}."
        )
    with file.open(encoding="utf-8", newline="") as f:
        missing = _GAMED_COLUMNS.difference(next(csv.reader(f), []))
    if missing:
        raise EvaluationError(f"{file}: the columns {', '.join(sorted(missing))} are missing.")
    return file


@dataclass(frozen=True)
class Fit:
    """What the package found.

    Attributes:
        rate, spread: `length_controlled_winrate` and `lc_standard_error`, in percent.
        c: the regularisation, given or chosen by cross-validation.
        weights: of length, difficulty and model.
        extreme: the rate is so far from the raw one that the package's authors take it for a sign
            that the fit may have failed.
    """

    rate: float
    spread: float
    c: float
    weights: tuple[float, float, float]
    extreme: bool


@contextmanager
def fitting(rows: Sequence[Row], places: Sequence[int], gamed: Path) -> Iterator[Any]:
    """Yields a function of C (None: cross-validation chooses) that fits as the package does.

    Args:
        rows: of `check_annotations`.
        places: which instruction each row is about: the package looks its difficulty up by it.
        gamed: of `gamed_file`, or of `alpaca_eval_published.write_gamed`.

    Raises:
        EvaluationError: the package is not there.
    """
    with package("metrics.glm_winrate") as glm:
        import pandas as pd

        frame = pd.DataFrame(
            [{key: row[key] for key in _FITTED} for row in rows], index=list(places)
        )
        theirs = glm.hf_hub_download, glm.fit_LogisticRegressionCV
        models: list[Any] = []

        def keep(*args: Any, **kwargs: Any) -> Any:
            models.append(theirs[1](*args, **kwargs))
            return models[-1]

        def fit(c: float | None) -> Fit:
            how = glm.GLM_INFO["length_controlled_v1"]
            if c is not None:
                how = how | {"kwargs": {"n_splits": 0, "C": c}}
            found = glm.get_length_controlled_winrate(
                frame.copy(), save_weights_dir=None, is_warn_extreme_changes=False, glm_info=how
            )
            rate = float(found["length_controlled_winrate"])
            extreme = glm.get_is_extreme_changes(found["win_rate"], rate)
            length, difficulty, model = models[-1].coef_[0].tolist()
            chosen = float(models[-1].C_[0]) if c is None else c
            return Fit(rate, float(found["lc_standard_error"]), chosen,
                       (length, difficulty, model), bool(extreme))  # fmt: skip

        glm.hf_hub_download = lambda **_: str(gamed)  # the one file it asks for
        glm.fit_LogisticRegressionCV = keep
        try:
            yield fit
        finally:
            glm.hf_hub_download, glm.fit_LogisticRegressionCV = theirs


def described(
    fit: Fit, rows: Sequence[Row], places: Sequence[int], gamed: Path, seed: int = 0
) -> dict[str, Any]:
    """A fit with its interval, under the names of the leaderboard where it has one."""
    error, low, high = interval(Regression.of(rows, places, gamed), fit, seed)
    return {
        "length_controlled_winrate": fit.rate,
        "length_controlled_winrate_low": low,
        "length_controlled_winrate_high": high,
        "lc_bootstrap_error": error,
        "lc_standard_error": fit.spread,
        "lc_c": fit.c,
        "lc_far_from_raw": fit.extreme,
    }


@dataclass(frozen=True)
class Regression:
    """What the fit reads. Rows of the gamed baselines come last.

    Attributes:
        features: tanh of the difference in length, difficulty, and 1 for the model's own rows.
        wins: how far the model won, from 0 to 1; a row that has no preference weighs 0.
        weight: of each row.
        own: how many rows are the model's.
    """

    features: Float[np.ndarray, "rows 3"]
    wins: Float[np.ndarray, " rows"]
    weight: Float[np.ndarray, " rows"]
    own: int

    @staticmethod
    def of(rows: Sequence[Row], places: Sequence[int], gamed: Path) -> Regression:
        with gamed.open(encoding="utf-8", newline="") as f:
            lines = list(csv.DictReader(f))
        difficulty: dict[int, float] = {}
        for line in lines:
            difficulty.setdefault(int(line["index"]), float(line["instruction_difficulty"]))
        delta = np.array([len(row["output_1"]) - len(row["output_2"]) for row in rows], float)
        own = np.stack([np.tanh(delta / delta.std(ddof=1)),
                        [difficulty[i] for i in places], np.ones(len(rows))], 1)  # fmt: skip
        theirs = [
            [np.tanh(float(line["std_delta_len"])), float(line["instruction_difficulty"]), 0.0]
            for line in lines
        ]
        judged = np.array([row["preference"] is not None for row in rows])
        mine = wins(np.array([1.5 if (x := row["preference"]) is None else x for row in rows]))
        return Regression(
            np.concatenate([own, theirs]),
            np.concatenate([mine, [float(line["preference"]) for line in lines]]),
            np.concatenate([judged.astype(float), np.full(len(lines), _STEADY)]),
            len(rows),
        )


def interval(data: Regression, fit: Fit, seed: int = 0) -> tuple[float, float, float]:
    """The rate's standard error over instructions, and its 95 % interval; in percent."""
    rng, n = np.random.default_rng(seed), data.own
    start, found = np.array(fit.weights), []
    for _ in range(_RESAMPLES // _DRAW):
        counts = rng.multinomial(n, np.full(n, 1 / n), _DRAW)
        weight = np.tile(data.weight, (_DRAW, 1))
        weight[:, :n] *= counts
        weights = refit(data, weight, fit.c, start)
        predicted = _sigmoid(weights[:, 1:] @ data.features[:n, 1:].T)
        found.append((predicted * counts).sum(1) / n)
    error, rate = float(np.concatenate(found).std(ddof=1)), fit.rate / 100
    dispersion = proportions.dispersion((n * error) ** 2, n * rate * (1 - rate))
    low, high = proportions.ends(rate, n, dispersion)
    return 100 * error, 100 * low, 100 * high


def refit(
    data: Regression, weight: Float[np.ndarray, "fits rows"], c: float, start: np.ndarray
) -> Weights:
    """The weights b that minimise |b| (sum of magnitudes) + C times the weighted log loss, once for
    each row of `weight`.

    Newton's method, with coordinate descent on each quadratic model: that is exact where a weight
    is 0, and the loss is convex.
    """
    x = data.features
    products = (x[:, :, None] * x[:, None, :]).reshape(len(x), 9)
    b = np.tile(start, (len(weight), 1))
    for _ in range(50):
        p = _sigmoid(b @ x.T)
        gradient = c * (weight * (p - data.wins)) @ x
        curvature = c * ((weight * p * (1 - p)) @ products).reshape(-1, 3, 3)
        curvature += 1e-9 * np.eye(3)  # a model that wins or loses everything has none
        new = _quadratic(b, gradient, curvature)
        step = np.clip(new - b, -2, 2)
        b = b + step
        if np.abs(step).max() < 1e-8:
            return b
    raise EvaluationError(
        "the length-controlled fit did not converge on a resample: the annotations are odd"
    )


def _quadratic(
    b: Weights, gradient: Float[np.ndarray, "fits 3"], curvature: Float[np.ndarray, "fits 3 3"]
) -> Weights:
    """The minimum of |new| + gradient (new - b) + (new - b) curvature (new - b) / 2."""
    new = b.copy()
    for _ in range(500):
        before = new.copy()
        for j in range(3):
            slope = gradient[:, j] + np.einsum("fi,fi->f", curvature[:, j], new - b)
            slope -= curvature[:, j, j] * new[:, j]
            new[:, j] = -np.sign(slope) * np.maximum(np.abs(slope) - 1, 0) / curvature[:, j, j]
        if np.abs(new - before).max() < 1e-11:
            break
    return new


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip(x, -500, 500)))
