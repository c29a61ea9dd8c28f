"""AlpacaEval's numbers from annotations.

A preference x is 1 where the baseline's answer wins, 2 where the model's does, and in between by the
judge's probabilities; 0, in old files, and 1.5 are draws. The raw win rate is 100 mean(x - 1), its
standard error 100 std(x - 1) / sqrt(n); the discrete one counts wins and half the draws.

The length-controlled win rate stands in `alpaca_eval_lc`.
"""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.benchmarks.alpaca_eval import instructions as alpaca_eval_set
from selm_jax.evaluation.benchmarks.alpaca_eval.instructions import BASELINE
from selm_jax.evaluation.benchmarks.files import Row
from selm_jax.statistics import proportions

INSTALL = "pip install 'selm_jax[alpaca-eval]'"

# Of the official leaderboard.csv, in its order.
COLUMNS = (
    "win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total",
    "discrete_win_rate", "mode", "avg_length", "length_controlled_winrate", "lc_standard_error",
)  # fmt: skip


def scores(rows: Sequence[Row]) -> dict[str, Any]:
    """All that needs nothing but the annotations; names as in the leaderboard.

    The win rate's interval is about other instructions (`proportions`); `standard_error` is the package's.

    Args:
        rows: of `alpaca_eval_set.check_annotations`.
    """
    found = [row["preference"] for row in rows if row["preference"] is not None]
    preferences = np.array(found, np.float64)
    lengths = [len(row["output_2"]) for row in rows]
    rates = win_rate(preferences)
    low, high = proportions.interval(wins(preferences))
    return rates | {
        "win_rate_low": 100 * low,
        "win_rate_high": 100 * high,
        "avg_length": int(np.mean(lengths)),  # characters, cut off to a whole number
        "missing": len(alpaca_eval_set.published().instructions) - len(found),
    }


def win_rate(preferences: Float64[np.ndarray, " n"]) -> dict[str, float | int | None]:
    """Win rates in percent; see the top of this file. One preference has no standard error: None.

    Raises:
        EvaluationError: no preference at all.
    """
    if not preferences.size:
        raise EvaluationError("there is no preference to take a win rate of.")
    x = wins(preferences)
    won, losses, draws = int((x > 0.5).sum()), int((x < 0.5).sum()), int((x == 0.5).sum())
    error = float(x.std(ddof=1) / np.sqrt(x.size) * 100) if x.size > 1 else None
    return {
        "win_rate": float(x.mean() * 100),
        "standard_error": error,
        "n_wins": won,
        "n_wins_base": losses,
        "n_draws": draws,
        "n_total": x.size,
        "discrete_win_rate": (won + draws / 2) / x.size * 100,
    }


def wins(preferences: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """How far the model won, from 0 to 1."""
    return np.where(preferences == 0, 1.5, preferences) - 1


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
    """For the terminal: the rates with 95 % intervals."""
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
        rate, low, high = (scored[f"length_controlled_winrate{x}"] for x in ("", "_low", "_high"))
        line = f"  length-controlled   {rate:6.2f} %  [{low:.2f}, {high:.2f}], C = {scored['lc_c']:.4g}"
        lines.insert(-2, line)
        if scored.get("lc_far_from_raw"):
            lines.append(
                "  the two rates are far apart; the package warns that the fit may fail so"
            )
    elif "lc_refused" in scored:
        lines.append(f"  length-controlled   refused: {scored['lc_refused']}")
    return "\n".join(lines)
