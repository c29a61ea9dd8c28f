"""Computes AlpacaEval's win rates from annotations.

A preference x is 1 if the baseline's answer wins, 2 if the model's wins, and between them according
to the judge's probabilities; 1.5 (and 0, in old files) is a draw. The raw win rate is
100 mean(x - 1) and its standard error 100 std(x - 1) / sqrt(n); the discrete win rate counts wins
and half the draws. `length_controlled` has the length-controlled win rate.
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

# The columns of the official leaderboard.csv, in its order.
COLUMNS = (
    "win_rate", "standard_error", "n_wins", "n_wins_base", "n_draws", "n_total",
    "discrete_win_rate", "mode", "avg_length", "length_controlled_winrate", "lc_standard_error",
)  # fmt: skip


def scores(rows: Sequence[Row]) -> dict[str, Any]:
    """Computes the leaderboard's numbers that depend on the annotations only, by name.

    The interval of the win rate is over instructions (`proportions`); `standard_error` is the
    package's.

    Args:
        rows: the result of `instructions.check_annotations`.
    """
    found = [row["preference"] for row in rows if row["preference"] is not None]
    preferences = np.array(found, np.float64)
    lengths = [len(row["output_2"]) for row in rows]
    rates = win_rate(preferences)
    low, high = proportions.interval(wins(preferences))
    return rates | {
        "win_rate_low": 100 * low,
        "win_rate_high": 100 * high,
        "avg_length": int(np.mean(lengths)),  # characters, rounded down
        "missing": len(alpaca_eval_set.published().instructions) - len(found),
    }


def win_rate(preferences: Float64[np.ndarray, " n"]) -> dict[str, float | int | None]:
    """Computes AlpacaEval's win rates in percent. The error is None for one preference.

    Raises:
        EvaluationError: there are no preferences.
    """
    if not preferences.size:
        raise EvaluationError("no row has a preference. Annotate again.")
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
    """Converts AlpacaEval's preferences to the model's wins, from 0 (lost) to 1 (won)."""
    return np.where(preferences == 0, 1.5, preferences) - 1


@contextlib.contextmanager
def package(module: str) -> Iterator[Any]:
    """Imports a module of `alpaca_eval` for a `with` block, and undoes its side effects after it.

    The package sets the root logger's level on import, and scikit-learn's settings when it fits.

    Raises:
        EvaluationError: the package cannot be imported.
    """
    import importlib

    root = logging.getLogger()
    level = root.level
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pkg_resources and scikit-learn's `penalty`
            try:
                found = importlib.import_module(f"alpaca_eval.{module}")
                import sklearn
            except ImportError as error:
                raise EvaluationError(
                    f"the alpaca_eval package cannot be imported ({error}). Run {INSTALL}"
                ) from error
            root.setLevel(logging.ERROR)  # it warns at every call
            with sklearn.config_context():
                yield found
    finally:
        root.setLevel(level)


def leaderboard(name: str, scored: Row) -> str:
    """Formats one model's row of the leaderboard as CSV, with the official columns."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["", *COLUMNS])
    values = dict(scored) | {"mode": "community"}
    writer.writerow([name, *(values.get(each, "") for each in COLUMNS)])
    return text.getvalue()


def table(name: str, scored: Row) -> str:
    """Formats the win rates and their 95 % intervals as text for the terminal."""
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
        ends = f"[{low:.2f}, {high:.2f}], C = {scored['lc_c']:.4g}"
        lines.insert(-2, f"  length-controlled   {rate:6.2f} %  {ends}")
        if scored.get("lc_far_from_raw"):
            lines.append(
                "  the two rates are far apart; the package warns that the fit may have failed"
            )
    elif "lc_refused" in scored:
        lines.append(f"  length-controlled   not computed: {scored['lc_refused']}")
    return "\n".join(lines)
