"""AlpacaEval's numbers from annotations.

A preference x is 1 where the baseline's answer wins, 2 where the model's does, and in between by the
judge's probabilities; 0, in old files, and 1.5 are draws. The raw win rate is 100 mean(x - 1), its
standard error 100 std(x - 1) / sqrt(n); the discrete one counts wins and half the draws.

The length-controlled win rate is the fit of the `alpaca_eval` package itself: a logistic regression
on difference of lengths, difficulty of the instruction and model, regularised by annotations of a
baseline made concise and verbose (`df_gamed.csv`, which is neither here nor in the package), then
predicted as if the lengths were equal.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from selm_jax import artifacts, proportions
from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.alpaca_eval_set import BASELINE, data_file
from selm_jax.evaluation.benchmark_files import Row

GAMED_FILE = "df_gamed.csv"
# As two other projects pin it at `HUB_REVISION`.
GAMED_SHA256 = "97aeec3f1c7de6dee6fd31fe66f1702623f4614c3efe1c6fc5f4927cd5fd674d"
_GAMED_COLUMNS = {
    "model", "preference", "index", "std_delta_len", "instruction_difficulty", "not_gamed_baseline",
}  # fmt: skip
_FITTED = ("preference", "output_1", "output_2", "generator_1", "generator_2", "annotator")
INSTALL = "pip install 'selm_jax[alpaca_eval]'"

# Of the official leaderboard.csv, in its order.
COLUMNS = (
    "win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total",
    "discrete_win_rate", "mode", "avg_length", "length_controlled_winrate", "lc_standard_error",
)  # fmt: skip


def scores(rows: Sequence[Row]) -> dict[str, Any]:
    """All that needs nothing but the annotations; names as in the leaderboard.

    Args:
        rows: of `alpaca_eval_set.check_annotations`.
    """
    found = [row["preference"] for row in rows if row["preference"] is not None]
    preferences = np.array(found, np.float64)
    lengths = [len(row["output_2"]) for row in rows]
    rates = win_rate(preferences)
    low, high = proportions.interval(_wins(preferences))
    return rates | {
        "win_rate_low": 100 * low,
        "win_rate_high": 100 * high,
        "avg_length": int(np.mean(lengths)),  # characters, cut off to a whole number
        "missing": len(rows) - len(found),
    }


def win_rate(preferences: Float64[np.ndarray, " n"]) -> dict[str, float | int | None]:
    """Win rates in percent; see the top of this file. One preference has no standard error: None.

    Raises:
        EvaluationError: no preference at all.
    """
    if not preferences.size:
        raise EvaluationError("there is no preference to take a win rate of.")
    x = _wins(preferences)
    wins, losses, draws = int((x > 0.5).sum()), int((x < 0.5).sum()), int((x == 0.5).sum())
    error = float(x.std(ddof=1) / np.sqrt(x.size) * 100) if x.size > 1 else None
    return {
        "win_rate": float(x.mean() * 100),
        "standard_error": error,
        "n_wins": wins,
        "n_wins_base": losses,
        "n_draws": draws,
        "n_total": x.size,
        "discrete_win_rate": (wins + draws / 2) / x.size * 100,
    }


def _wins(preferences: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """How far the model won, from 0 to 1."""
    return np.where(preferences == 0, 1.5, preferences) - 1


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


def length_controlled(rows: Sequence[Row], gamed: Path) -> dict[str, float]:
    """`length_controlled_winrate` and `lc_standard_error` in percent, as the package fits them.

    Args:
        rows: of `check_annotations`: row i must be instruction i, for the package looks its
            difficulty up by position.
        gamed: of `gamed_file`.

    Raises:
        EvaluationError: the package is not there.
    """
    frame = [{key: row[key] for key in _FITTED} for row in rows]
    with package("metrics.glm_winrate") as glm:
        theirs = glm.hf_hub_download
        glm.hf_hub_download = lambda **_: str(gamed)  # the one file it asks for
        try:
            found = glm.get_length_controlled_winrate(
                frame, save_weights_dir=None, is_warn_extreme_changes=False
            )
        finally:
            glm.hf_hub_download = theirs
        extreme = glm.get_is_extreme_changes(found["win_rate"], found["length_controlled_winrate"])
    return {
        "length_controlled_winrate": float(found["length_controlled_winrate"]),
        "lc_standard_error": float(found["lc_standard_error"]),
        "lc_far_from_raw": bool(extreme),  # a sign, its authors say, that the fit may have failed
    }


@contextlib.contextmanager
def package(module: str) -> Iterator[Any]:
    """A module of `alpaca_eval`, which leaves the process as it was: it sets the root logger's
    level when imported, and scikit-learn's settings when it fits.

    Raises:
        EvaluationError: it cannot be imported.
    """
    import importlib

    root = logging.getLogger()
    level = root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pkg_resources, and of scikit-learn's `penalty`
            try:
                found = importlib.import_module(f"alpaca_eval.{module}")
                import sklearn
            except ImportError as error:
                raise EvaluationError(
                    f"the alpaca_eval package cannot be imported ({error}). {INSTALL}"
                ) from error
            root.setLevel(logging.ERROR)  # it warns at every call
            with sklearn.config_context():
                yield found
    finally:
        root.setLevel(level)


def leaderboard(name: str, scored: Row) -> str:
    """One model's row, as a CSV file with the official columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *COLUMNS])
    values = dict(scored) | {"mode": "community"}
    writer.writerow([name, *(values.get(each, "") for each in COLUMNS)])
    return text.getvalue()


def table(name: str, scored: Row) -> str:
    """For the terminal: the rates with 95 % intervals (normal: 1.96 standard errors)."""
    low, high = scored["win_rate_low"], scored["win_rate_high"]
    outcomes = f"{scored['n_wins']} won, {scored['n_draws']} drawn, {scored['n_wins_base']} lost"
    lines = [
        f"{name} against {BASELINE}, {scored['n_total']} instructions",
        f"  win rate            {scored['win_rate']:6.2f} %  [{low:.2f}, {high:.2f}]",
        f"  discrete win rate   {scored['discrete_win_rate']:6.2f} %  {outcomes}",
        f"  average length      {scored['avg_length']:6,} characters",
    ]
    if scored.get("missing"):
        lines.insert(1, f"  no preference in    {scored['missing']} instructions; left out")
    if scored.get("length_controlled_winrate") is not None:
        rate, error = scored["length_controlled_winrate"], scored["lc_standard_error"]
        low, high = _interval(rate, error)
        lines.insert(-2, f"  length-controlled   {rate:6.2f} %  [{low:.2f}, {high:.2f}]")
        if scored.get("lc_far_from_raw"):
            lines.append(
                "  the two rates are far apart; the package warns that the fit may fail so"
            )
    elif "lc_refused" in scored:
        lines.append(f"  length-controlled   refused: {scored['lc_refused']}")
    return "\n".join(lines)


def _interval(rate: float, error: float) -> tuple[float, float]:
    return rate - 1.96 * error, rate + 1.96 * error
