"""Means over prompts, and over seeds where there are several, with their intervals.

With one seed the percentile bootstrap over prompts, each drawn whole: with all its answers. With
several, `crossed`: an interval about new prompts and new seeds. A bootstrap of three seeds can draw
nothing beyond the least and the greatest of them, and holds the truth in 3 of 4 cases only.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from selm_jax.evaluation import crossed

RESAMPLES = 4999


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and its 95 % interval."""

    mean: float
    stderr: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pooled(values: Float[np.ndarray, "seeds prompts"], seed: int = 0) -> Estimate:
    """The mean of all values; `seed` is the bootstrap's."""
    if len(values) > 1:
        return _of(crossed.estimate(values))
    (values,) = values
    mean, prompts = float(values.mean()), len(values)
    if prompts < 2 or np.ptp(values) == 0:
        return Estimate(mean, 0.0 if prompts > 1 else float("nan"), mean, mean)
    rng = np.random.default_rng(seed)
    found = rng.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES) @ values / prompts
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(mean, float(found.std(ddof=1)), float(low), float(high))


def difference(
    values: Float[np.ndarray, "seeds prompts"],
    others: Float[np.ndarray, "other_seeds prompts"],
    seed: int = 0,
) -> Estimate:
    """The mean of `values` minus that of `others`, paired by prompt, and by seed where both have as
    many."""
    if len(values) == len(others) == 1:
        return pooled(values - others, seed)
    return _of(crossed.difference(values, others))


def _of(e: crossed.Estimate) -> Estimate:
    return Estimate(e.mean, e.stderr, e.low, e.high)
