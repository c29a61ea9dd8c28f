"""Computes AlpacaEval's length-controlled win rate with the package's fit, and an interval.

The fit is a logistic regression of the preferences on the difference in length, the difficulty of
the instruction and the model. Annotations of a concise and a verbose version of the baseline
(`df_gamed.csv`, or its replacement by `published`) regularise it. The rate is the mean prediction
at equal length.

The package's `lc_standard_error` is the standard deviation of these predictions over instructions,
divided by sqrt(805). That is not how much the rate would vary with other instructions, which is 1.8
to 6 times as much. The interval here measures the latter: instructions are resampled with their
annotations, and the fit is repeated for each resample. The standard error gives an interval by
`proportions`, which does not shrink to a point if the model loses (or wins) everything.
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
# As pinned by two other projects at `HUB_REVISION`.
GAMED_SHA256 = "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d"
_GAMED_COLUMNS = {
    "model", "preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline",
}  # fmt: skip
_FITTED = ("preference", "output_1", "output_2", "generator_1", "generator_2", "annotator")
_STEADY = 0.1  # the weight of an annotation of a gamed baseline
_RESAMPLES = 1000
_DRAW = 100  # how many resamples are fitted together

Weights = Float[np.ndarray, "fits 3"]  # weights of length, difficulty and model


def gamed_file(given: str | None, sha256: str | None = None) -> Path:
    """Finds `df_gamed.csv`, checks its digest, and returns its path.

    Args:
        given: see `instructions.data_file`.
        sha256: the expected digest in hex; by default the published file's.

    Raises:
        EvaluationError: the file is missing, or is another one.
    """
    file = data_file(GAMED_FILE, given, "--gamed")
    expected = (sha256 or GAMED_SHA256).lower()
    found = artifacts.digest(file)
    if found != expected:
        raise EvaluationError(
            f"{file}: its SHA-256 is {found}; expected {expected}. With another file the "
            "length-controlled win rate would not be the leaderboard's. To use this file anyway, "
            f"add --gamed-sha256 {found}."
        )
    with file.open(encoding="utf-8", newline="") as f:
        missing = _GAMED_COLUMNS.difference(next(csv.reader(f), []))
    if missing:
        raise EvaluationError(
            f"{file}: the columns {', '.join(sorted(missing))} are missing; expected the format of "
            f"{GAMED_FILE}."
        )
    return file


@dataclass(frozen=True)
class Fit:
    """The result of the `alpaca_eval` package's length-controlled fit.

    Attributes:
        rate, spread: `length_controlled_winrate` and `lc_standard_error`, in percent.
        c: the regularisation C, given or chosen by cross-validation.
        weights: weights of length, difficulty and model.
        extreme: whether the rate is so far from the raw one that the fit may have failed, by the
            package's own rule.
    """

    rate: float
    spread: float
    c: float
    weights: tuple[float, float, float]
    extreme: bool


@contextmanager
def fitting(rows: Sequence[Row], places: Sequence[int], gamed: Path) -> Iterator[Any]:
    """Yields a function of the regularisation C that runs the package's fit (None: chosen by CV).

    Args:
        rows: the result of `check_annotations`.
        places: the number of each row's instruction, by which its difficulty is looked up.
        gamed: the file of `gamed_file`, or of `published.write_gamed`.

    Raises:
        EvaluationError: the package is not installed.
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

        glm.hf_hub_download = lambda **_: str(gamed)  # the only file that it downloads
        glm.fit_LogisticRegressionCV = keep
        try:
            yield fit
        finally:
            glm.hf_hub_download, glm.fit_LogisticRegressionCV = theirs


def described(
    fit: Fit, rows: Sequence[Row], places: Sequence[int], gamed: Path, seed: int = 0
) -> dict[str, Any]:
    """Returns a fit's numbers and interval by name, with the leaderboard's names if possible."""
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
    """The data of the length-controlled fit. The rows of the gamed baselines come last.

    Attributes:
        features: tanh of the difference in length; difficulty; and 1 for the model's own rows.
        wins: how far the model won, from 0 to 1.
        weight: the weight of each row; 0 for a row without a preference.
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
    """The win rate's standard error over instructions, and its 95 % interval, in percent."""
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
    """Minimises |b|_1 + C times the weighted log loss over b, once for each row of `weight`.

    It uses Newton's method with coordinate descent on each quadratic model. This gives weights that
    are exactly 0, and the loss is convex.
    """
    x = data.features
    products = (x[:, :, None] * x[:, None, :]).reshape(len(x), 9)
    b = np.tile(start, (len(weight), 1))
    for _ in range(50):
        p = _sigmoid(b @ x.T)
        gradient = c * (weight * (p - data.wins)) @ x
        curvature = c * ((weight * p * (1 - p)) @ products).reshape(-1, 3, 3)
        curvature += 1e-9 * np.eye(3)  # it vanishes for a model that wins or loses everything
        new = _quadratic(b, gradient, curvature)
        step = np.clip(new - b, -2, 2)
        b = b + step
        if np.abs(step).max() < 1e-8:
            return b
    raise EvaluationError(
        "the length-controlled fit did not converge on a resample. Check the annotations: their "
        "preferences or lengths may be degenerate"
    )


def _quadratic(
    b: Weights, gradient: Float[np.ndarray, "fits 3"], curvature: Float[np.ndarray, "fits 3 3"]
) -> Weights:
    """Minimises |new| + gradient (new - b) + (new - b) curvature (new - b) / 2 over `new`."""
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
