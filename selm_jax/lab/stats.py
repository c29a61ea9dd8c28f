"""Computes statistics over seeds: means with intervals, slopes, corrected p-values."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from selm_jax.statistics.intervals import Estimate, difference
from selm_jax.statistics.multiple import holm

Record = dict[str, Any]


def over_seeds(
    values: np.ndarray | jax.Array, base: np.ndarray | jax.Array | float = 0
) -> Estimate:
    """The mean of `values - base` over seeds, with a confidence interval over seeds.

    The mean is NaN, without an interval, if a run diverged.
    """
    columns = (np.broadcast_to(np.asarray(x, np.float64), np.shape(values)) for x in (values, base))
    found = difference(*(column[:, None] for column in columns))
    return found or Estimate(math.nan, None, None, None, seeds=len(values))


def curve(values: Float[np.ndarray, "points seeds"]) -> Record:
    """The mean over seeds at each point of a curve, with confidence intervals."""
    found = [over_seeds(each) for each in values]
    return {name: [getattr(e, name) for e in found] for name in ("mean", "low", "high")}


def loglog_slope(regret: Float[np.ndarray, "seeds rounds"]) -> Record:
    """The least-squares slope of log cumulative regret against log t in the last three quarters.

    The cumulative regret is the mean over seeds, with a confidence interval over seeds. A slope
    of 1 means constant regret per round, 1/2 is the rate in the SELM paper's theorem, and 0 means
    no further regret. The slope is a smooth function of a mean, so to first order its error is that
    of a mean over seeds (the delta method: Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, ch. 21).
    """
    rounds = regret.shape[1]
    late = slice(rounds // 4, rounds)
    x = np.log(np.arange(1, rounds + 1)[late])
    x = (x - x.mean()) / np.sum((x - x.mean()) ** 2)
    so_far = np.cumsum(regret, axis=1, dtype=np.float64)[:, late]
    mean = so_far.mean(0)
    slope = float(np.log(mean) @ x)
    found = over_seeds(slope + (so_far / mean - 1) @ x)
    return {"slope": slope, "slope_low": found.low, "slope_high": found.high}


def compare(total: np.ndarray | jax.Array, base: np.ndarray | jax.Array) -> Record:
    """Compares the cumulative regret [seeds] of two algorithms with the same seeds.

    `p` is 1 if all seeds differ by the same amount, because then there is no interval.
    """
    found = over_seeds(total, base)
    return {
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "relative": float(found.mean / base.mean()),
        "base": float(base.mean()),
        "p": 1.0 if found.p is None else found.p,
    }


def correct(records: list[Record]) -> list[Record]:
    """Adds Holm-corrected p-values to the records, which form one family of tests."""
    adjusted = holm(np.array([r["p"] for r in records]))
    return [r | {"p_holm": float(p)} for r, p in zip(records, adjusted, strict=True)]
