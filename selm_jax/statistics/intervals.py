"""Means over prompts, and over seeds where there are several, with their intervals.

With one seed the percentile bootstrap over prompts, each drawn whole: with all its answers. With
several, `crossed`: an interval about new prompts and new seeds. A bootstrap of three seeds can draw
nothing beyond the least and the greatest of them, and holds the truth in 3 of 4 cases only.

A mean that is a share, of values from 0 to 1, has the interval of `proportions`: at its ends a
bootstrap says too much. Where values may lie anywhere and are all the same there is no interval, for
nothing tells how far others would lie from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from selm_jax.statistics import crossed, proportions

RESAMPLES = 4999


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and its 95 % interval.

    Attributes:
      stderr: None with one prompt.
      low, high: None with one prompt or equal values, unless the mean is a share.
    """

    mean: float
    stderr: float | None
    low: float | None
    high: float | None

    def __str__(self) -> str:
        if self.low is None:
            why = "one prompt" if self.stderr is None else "all values are equal"
            return f"{self.mean:.3f} (no interval: {why})"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pooled(
    values: Float[np.ndarray, "seeds prompts"], seed: int = 0, *, share: bool = False
) -> Estimate:
    """The mean of all values.

    Args:
      seed: the bootstrap's.
      share: whether the values are from 0 to 1, and their mean a share.
    """
    if len(values) > 1:
        return _over_seeds(crossed.estimate(values), (0, 1) if share else None)
    (values,) = values
    mean, prompts = float(values.mean()), len(values)
    stderr = float(stats.sem(values)) if prompts > 1 else None
    if share:
        return Estimate(mean, stderr, *proportions.interval(values))
    if prompts < 2 or np.ptp(values) == 0:
        return Estimate(mean, stderr, None, None)
    rng = np.random.default_rng(seed)
    found = rng.multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES) @ values / prompts
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(mean, stderr, float(low), float(high))


def difference(
    values: Float[np.ndarray, "seeds prompts"],
    others: Float[np.ndarray, "other_seeds prompts"],
    seed: int = 0,
    *,
    share: bool = False,
) -> Estimate:
    """The mean of `values` minus that of `others`, paired by prompt, and by seed where both have as
    many. With `share` both are shares, and their difference is from -1 to 1."""
    if len(values) == len(others) == 1:
        if not share:
            return pooled(values - others, seed)
        (gaps,) = values - others
        stderr = float(stats.sem(gaps)) if len(gaps) > 1 else None
        return Estimate(float(gaps.mean()), stderr, *proportions.difference(gaps))
    found = crossed.difference(values, others)
    return _over_seeds(found, (-1, 1) if share else None)


def _over_seeds(e: crossed.Estimate, share_of: tuple[int, int] | None) -> Estimate:
    """`share_of` are the ends of the values' range, where their mean is a share or a difference of
    shares."""
    if share_of is not None:
        return Estimate(e.mean, e.stderr, *bounded(e, *share_of))
    alike = e.stderr == 0
    return Estimate(e.mean, e.stderr, None if alike else e.low, None if alike else e.high)


def bounded(e: crossed.Estimate, least: int, most: int) -> tuple[float, float]:
    """The interval of a mean over seeds and prompts of values that lie from `least` to `most`.

    A share's squares are in part what `proportions` adds. That part is known, and so the squares
    have more degrees of freedom (Satterthwaite) than those that the seeds leave.
    """
    width = most - least
    mean, squares = (e.mean - least) / width, (e.prompts * e.stderr / width) ** 2
    dispersion = proportions.dispersion(squares, e.prompts * mean * (1 - mean))
    freedom = e.freedom * (1 + proportions.ADDED / squares) ** 2 if squares else np.inf
    quantile = float(stats.t.ppf(0.975, freedom))
    low, high = proportions.ends(mean, e.prompts, dispersion, quantile)
    return least + width * low, least + width * high
