"""What numbers over seeds allow one to say."""

from __future__ import annotations

from typing import Any

import numpy as np
import scipy.stats
from jaxtyping import Float

Record = dict[str, Any]


def mean_interval(
    values: Float[np.ndarray, "*cells seeds"], level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds and the ends of its t interval."""
    n = values.shape[-1]
    mean = values.mean(-1)
    half = values.std(-1, ddof=1) / n**0.5 * scipy.stats.t.ppf(0.5 + level / 2, n - 1)
    return mean, mean - half, mean + half


def p_zero_mean(differences: Float[np.ndarray, "*cells seeds"]) -> Float[np.ndarray, "*cells"]:
    """Two-sided t test that the mean is 0. Differences that are all the same 0 have p = 1."""
    mean, low, high = mean_interval(differences.astype(np.float64))
    still = low == high
    error = np.where(still, 1, differences.std(-1, ddof=1) / differences.shape[-1] ** 0.5)
    p = 2 * scipy.stats.t.sf(np.abs(mean) / error, differences.shape[-1] - 1)
    return np.where(still, np.where(mean == 0, 1.0, 0.0), p)


def holm(p: Float[np.ndarray, "*cells"]) -> Float[np.ndarray, "*cells"]:
    """Holm's adjusted p-values: the chance of even one false claim among all cells is kept."""
    flat = p.reshape(-1)
    order = np.argsort(flat, kind="stable")
    steps = flat[order] * np.arange(len(flat), 0, -1)
    adjusted = np.empty_like(flat)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted.reshape(p.shape)


def loglog_slope(
    regret: Float[np.ndarray, "seeds rounds"], seed: int = 0, resamples: int = 2000
) -> tuple[float, float, float]:
    """Slope of log cumulative regret against log t over the last three quarters, 95 % bootstrap.

    The cumulative regret is the mean over seeds; seeds are resampled. 1: regret per round stands
    still; 1/2: the rate of the SELM paper's theorem; 0: nothing more is lost.
    """
    seeds, rounds = regret.shape
    late = slice(rounds // 4, rounds)
    x = np.log(np.arange(1, rounds + 1)[late])
    x = (x - x.mean()) / np.sum((x - x.mean()) ** 2)

    def slope(counts):  # counts: [..., seeds]
        mean = counts @ np.cumsum(regret, axis=1, dtype=np.float64)[:, late]
        return np.log(mean) @ x

    drawn = np.random.default_rng(seed).multinomial(seeds, np.full(seeds, 1 / seeds), resamples)
    low, high = np.quantile(slope(drawn), [0.025, 0.975])
    return float(slope(np.ones(seeds))), float(low), float(high)


def compare(total: np.ndarray, base: np.ndarray) -> Record:
    """How cumulative regret [seeds] differs from another's with the same seeds."""
    difference = np.asarray(total, np.float64) - np.asarray(base)
    mean, low, high = mean_interval(difference)
    return {
        "difference": float(mean),
        "low": float(low),
        "high": float(high),
        "relative": float(mean / base.mean()),
        "base": float(base.mean()),
        "p": float(p_zero_mean(difference)),
    }


def correct(records: list[Record]) -> list[Record]:
    """Adds Holm's p over all records; they are one family of tests."""
    adjusted = holm(np.array([r["p"] for r in records]))
    return [r | {"p_holm": float(p)} for r, p in zip(records, adjusted, strict=True)]
