"""Means over prompts and seeds, and paired differences of two, with their 95 % intervals.

What an interval is about: other prompts of the same kind, drawn at random, each with all its answers;
with several seeds other seeds of the method as well, at once (`crossed`). With one seed nothing is
said about others.

The interval is mean +- t * stderr, with Student's t (Biometrika 6, 1908): of the same kind for one seed
as for several, and without random numbers. tests/statistics/test_intervals.py has how often it holds
the truth. A percentile bootstrap of a mean is narrower and holds it more seldom: it takes no account
of how few prompts its own spread is estimated from, and drawn from three seeds it finds nothing
beyond the least and the greatest of them.

A mean that is a share, of values from 0 to 1, has the interval of `proportions` instead, which is no
point where all are won. Where values may lie anywhere and are all the same there is no interval, for
nothing tells how far others would lie from them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from selm_jax.statistics import crossed, proportions

_EQUAL = 1e-12  # of the values: what rounding leaves of a difference between equal ones


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and its 95 % interval.

    Attributes:
      stderr: None with a single value.
      low, high: None with a single value or equal ones, unless the mean is a share.
      p: the two-sided test that the mean is 0, below 0.05 just where the interval leaves 0 out. Without
        an interval 1 if every value is 0, else None. A share has none, a difference of shares has.
      seeds, prompts: what it is the mean over. With one seed it is about other prompts alone.
    """

    mean: float
    stderr: float | None
    low: float | None
    high: float | None
    p: float | None = None
    seeds: int = 1
    prompts: int = 1

    def __str__(self) -> str:
        if self.low is None:
            why = "one prompt" if self.stderr is None else "all values are equal"
            return f"{self.mean:.3f} (no interval: {why})"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pooled(values: Float[np.ndarray, "seeds prompts"], *, share: bool = False) -> Estimate | None:
    """The mean over seeds and prompts, of the prompts that have a finite value with every seed.

    None if no prompt has.

    Args:
      share: whether the values are from 0 to 1, and their mean a share.
    """
    (values,) = known(values)
    if not values.size:
        return None
    found = crossed.mean(values) if values.size > 1 else None
    return _estimate(values, found, np.abs(values).max(), len(values), 0 if share else None)


def difference(
    values: Float[np.ndarray, "seeds prompts"],
    others: Float[np.ndarray, "other_seeds prompts"],
    *,
    share: bool = False,
) -> Estimate | None:
    """The mean of `values` minus that of `others`, paired by prompt, and by seed where both have as
    many; of the prompts that have a finite value in all of them. None if no prompt has.

    Args:
      share: whether both are means of values from 0 to 1; their difference is from -1 to 1.
    """
    values, others = known(values, others)
    if not values.size:
        return None
    seeds, most = sorted((len(values), len(others)))
    found = crossed.difference(values, others) if most * values.shape[1] > 1 else None
    largest = max(np.abs(values).max(), np.abs(others).max())
    if seeds < most:  # each seed of the one against the mean of the other's
        values, others = (
            x if len(x) == most else x.mean(0, keepdims=True) for x in (values, others)
        )
    return _estimate(values - others, found, largest, seeds, -1 if share else None)


def weighted(
    values: Float[np.ndarray, " clusters"], weights: Float[np.ndarray, " clusters"]
) -> Estimate:
    """The mean over answers that come in clusters: of questions, whose means and numbers are given.

    It is about other questions, each with all its answers. The mean is a ratio of two sums; its
    standard error is that of the ratio linearised (Cochran, Sampling Techniques, 1977, section 6.4),
    and with equal weights the plain one.
    """
    mean = np.average(values, weights=weights)
    gaps = (mean + weights / weights.mean() * (values - mean))[None]
    found = crossed.mean(gaps) if len(values) > 1 else None
    return _estimate(gaps, found, np.abs(values).max(), 1, None)


def known(*tables: Float[np.ndarray, "_ prompts"]) -> list[Float[np.ndarray, "_ known"]]:
    """The tables, of seeds by prompts, without the prompts that have no finite value in one of them."""
    there = np.logical_and.reduce([np.isfinite(table).all(axis=0) for table in tables])
    return [table[:, there] for table in tables]


def _estimate(
    gaps: Float[np.ndarray, "seeds prompts"],
    found: crossed.Mean | None,
    largest: float,
    seeds: int,
    least: int | None,
) -> Estimate:
    """The estimate of the mean of `gaps`.

    Args:
      found: their mean with its standard error; None of a single value.
      largest: the greatest magnitude of what they are differences of.
      seeds: how many it is about.
      least: of a share the least that it can be, 0 or -1; None of other means.
    """
    mean, prompts = float(gaps.mean()), gaps.shape[1]
    stderr = None if found is None else found.stderr
    if least is not None:
        share = _share(gaps, found, least)
        low, high = (least + (1 - least) * end for end in share.interval())
        p = share.p(-least / (1 - least)) if least else None
        return Estimate(mean, stderr, low, high, p, seeds, prompts)
    if found is None or np.ptp(gaps) <= _EQUAL * largest or found.stderr == 0:
        p = 1.0 if abs(mean) <= _EQUAL * largest else None
        return Estimate(mean, None if found is None else 0.0, None, None, p, seeds, prompts)
    half = float(stats.t.ppf(0.975, found.freedom)) * found.stderr
    p = float(2 * stats.t.sf(abs(mean) / found.stderr, found.freedom))
    return Estimate(mean, stderr, mean - half, mean + half, p, seeds, prompts)


def _share(
    gaps: Float[np.ndarray, "seeds prompts"], found: crossed.Mean | None, least: int
) -> proportions.Share:
    """Values from `least` to 1 as a share from 0 to 1.

    Over several seeds the squares are in part what `proportions` adds. That part is known, and so
    they have more degrees of freedom (Satterthwaite) than those that the seeds leave.
    """
    if len(gaps) == 1 or found is None:
        return proportions.Share.of((gaps.ravel() - least) / (1 - least))
    width, prompts = 1 - least, gaps.shape[1]
    mean, squares = (found.mean - least) / width, (prompts * found.stderr / width) ** 2
    dispersion = proportions.dispersion(squares, prompts * mean * (1 - mean))
    freedom = found.freedom * (1 + proportions.ADDED / squares) ** 2 if squares else np.inf
    return proportions.Share(mean, prompts, dispersion, freedom)
