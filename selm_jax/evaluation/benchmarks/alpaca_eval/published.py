"""Reconstructs the data of AlpacaEval's length-controlled fit from its public repository.

The fit needs `df_gamed.csv`: annotations of a concise and a verbose version of the baseline, and
the difficulty of each instruction. That file is not in the repository, but five other files
determine everything that the fit uses:

- A stored annotation file has `glm_preference` = sigmoid(theta + psi * difficulty), to ten digits,
  and the stored weights include theta and psi. This gives the difficulties to 5e-8.
- The fit uses three things of the two gamed baselines: tanh of the standardised difference in
  length, which follows from their outputs; the difficulty; and two sums of their preferences.
  `SUMS` has these sums: they were computed from the score equations of ten stored fits, which
  agree.

`write_gamed` writes a file in the format of `df_gamed.csv` with the same sums but other preferences
in each row. With the regularisation C of a stored fit it gives that fit's rate within 4e-7 points.
The C that cross-validation would choose depends on the rows; therefore C is taken from the stored
fits: `nearest_c` finds it for a model that is among them.
"""

from __future__ import annotations

import csv
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import optimize

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.alpaca_eval import length_controlled as lc
from selm_jax.evaluation.benchmarks.alpaca_eval.instructions import (
    BASELINE,
    check_instructions,
    published,
)
from selm_jax.evaluation.benchmarks.files import Row, read_rows, text_of
from selm_jax.shell import artifacts

COMMIT = "cd543a149df89434d8a54582c0151c0b945c3d20"  # the repository's commit of the digests
_JUDGE = "weighted_alpaca_eval_gpt4_turbo"
_OF_FIT = "vicuna-13b-v1.5"  # the model whose stored annotations include the fit's preferences
WEIGHTS = f"src/alpaca_eval/metrics/weights/{_JUDGE}/length_controlled_v1/baseline_{BASELINE}.csv"
FITTED = f"results/{_OF_FIT}/{_JUDGE}/{_JUDGE}/annotations.json"
OUTPUTS = f"results/{BASELINE}/model_outputs.json"
CONCISE = f"results/{BASELINE}_concise/model_outputs.json"
VERBOSE = f"results/{BASELINE}_verbose/model_outputs.json"
SHA256: Mapping[str, str] = {
    WEIGHTS: "3bd6d5a46327020f1b3eea79ac62d537f89a953d44ab0a6da83c954e36a23254",
    FITTED: "006353d44b04662232ff463ad4cf1de4ec73901a0544a521e2eb89905166f212",
    OUTPUTS: "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",
    CONCISE: "eff59f86f4da5bd23964af58ba2f7dd3341be2884e20958d21fca49456891627",
    VERBOSE: "b0f5a776fdeaf0a39db7f8f1b10ee5a4613468ff5c7b7a577645ea23f2995e38",
}
# Over the gamed baselines' rows, the sums of preference times tanh(length) and times difficulty.
SUMS = (-182.692375, 413.0468)
# The values of C among which the package chooses, and the one of most stored fits.
CHOICES = tuple(np.logspace(-4, 4, 10).tolist())
USUAL_C = CHOICES[5]
_NEAR = 0.05  # weights that differ by more belong to different fits

Weights = tuple[float, float, float]  # weights of length, difficulty and model


@dataclass(frozen=True)
class Published:
    """The data in AlpacaEval's public repository that the length-controlled fit needs.

    Attributes:
      weights: by model, the weights of the leaderboard's fits.
      difficulty: the difficulty of each instruction.
      lengths: standardised differences in length of the concise and of the verbose baseline.
    """

    weights: Mapping[str, Weights]
    difficulty: Float[np.ndarray, " instructions"]
    lengths: tuple[Float[np.ndarray, " instructions"], Float[np.ndarray, " instructions"]]


def read(folder: Path) -> Published:
    """Reads the published data from a clone of AlpacaEval's repository or a folder like it.

    Raises:
      EvaluationError: a file is missing or differs from the expected one.
    """
    for name, expected in SHA256.items():
        if not (folder / name).is_file():
            raise EvaluationError(
                f"--published {folder}: {name} is not there. Expected a clone of AlpacaEval's "
                "repository, or a folder with five of its files in the same layout "
                "(docs/evaluate.md lists them and the commands to download them)."
            )
        if (found := artifacts.digest(folder / name)) != expected:
            raise EvaluationError(
                f"{folder / name}: its SHA-256 is {found}; expected {expected}, as at commit "
                f"{COMMIT[:8]} of AlpacaEval's repository. Check out that commit."
            )
    weights = _weights(folder / WEIGHTS)
    fitted = [_number(row, FITTED, i) for i, row in enumerate(_rows(folder / FITTED))]
    _, psi, theta = weights[_OF_FIT]
    p = np.array(fitted)
    difficulty = (np.log(p / (1 - p)) - theta) / psi
    baseline, *gamed = (_output_lengths(folder / name) for name in (OUTPUTS, CONCISE, VERBOSE))
    concise, verbose = (_standardised(baseline - each) for each in gamed)
    return Published(weights, difficulty, (concise, verbose))


def write_gamed(found: Published, file: Path) -> None:
    """Writes a substitute for `df_gamed.csv`, which gives the same fits as the original."""
    delta, difficulty = np.concatenate(found.lengths), np.tile(found.difficulty, 2)
    preference = _with_sums(np.stack([np.tanh(delta), difficulty], 1), np.array(SUMS))
    count = len(found.difficulty)
    with file.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f)
        writer.writerow(
            ["model", "preference", "index", "std_delta_len", "instruction_difficulty",
             "not_gamed_baseline"]
        )  # fmt: skip
        columns = (each.tolist() for each in (preference, delta, difficulty))
        for i, (y, length, hard) in enumerate(zip(*columns, strict=True)):
            name = f"{BASELINE}_{'concise' if i < count else 'verbose'}"
            writer.writerow([name, y, i % count, length, hard, False])


def _with_sums(
    features: Float[np.ndarray, "rows 2"], sums: Float[np.ndarray, "2"]
) -> Float[np.ndarray, " rows"]:
    """Finds preferences from 0 to 1 for which features.T @ preferences equals `sums`."""

    def preferences(q: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-features @ q))

    found = optimize.root(lambda q: features.T @ preferences(q) - sums, np.zeros(2), tol=1e-12)
    if not np.allclose(features.T @ preferences(found.x), sums, atol=1e-7):
        raise EvaluationError(
            "the published files do not reproduce the stored fits: they differ from those of "
            f"commit {COMMIT[:8]} of AlpacaEval's repository. Check out that commit."
        )
    return preferences(found.x)


def _weights(file: Path) -> dict[str, Weights]:
    with file.open(encoding="utf-8", newline="") as f:
        _, *rows = csv.reader(f)
    return {name: (float(a), float(b), float(c)) for name, a, b, c in rows}


def _rows(file: Path) -> list[dict]:
    rows = read_rows(file)
    texts = [text_of(row, "instruction", file, i) for i, row in enumerate(rows)]
    check_instructions(texts, str(file), published())
    return rows


def _number(row: Mapping, where: str, i: int) -> float:
    value = row.get("glm_preference")
    if not isinstance(value, float) or not 0 < value < 1 or not math.isfinite(value):
        raise EvaluationError(
            f"{where}, row {i}: glm_preference is {value!r}; expected a number between 0 and 1."
        )
    return value


def _output_lengths(file: Path) -> Float[np.ndarray, " instructions"]:
    rows = _rows(file)
    return np.array([len(text_of(row, "output", file, i)) for i, row in enumerate(rows)], float)


def _standardised(delta: np.ndarray) -> np.ndarray:
    return delta / delta.std(ddof=1)


def length_controlled(rows: Sequence[Row], places: Sequence[int], folder: Path) -> dict[str, Any]:
    """Computes the length-controlled win rate and its interval from the published data.

    Args:
      rows, places: see `length_controlled.fitting`.
      folder: see `read`.
    """
    found = read(folder)
    model = rows[0]["generator_2"]
    stored = found.weights.get(model) if rows[0]["annotator"] == _JUDGE else None
    with tempfile.TemporaryDirectory() as temporary:
        gamed = Path(temporary) / "gamed.csv"
        write_gamed(found, gamed)
        with lc.fitting(rows, places, gamed) as fit:
            c = None if stored is None else nearest_c([fit(each) for each in CHOICES], stored)
            numbers = lc.described(fit(c or USUAL_C), rows, places, gamed)
    origin = f"the published fit of {model}" if c else "most published fits"
    return numbers | {"lc_c_from": origin, "published_sha256": dict(SHA256)}


def nearest_c(fits: Sequence[lc.Fit], stored: Weights) -> float | None:
    """Finds the regularisation C whose fit has the stored weights; None if no fit is near them."""
    apart = [max(map(abs, np.subtract(fit.weights, stored).tolist())) for fit in fits]
    nearest = int(np.argmin(apart))
    return fits[nearest].c if apart[nearest] < _NEAR else None
