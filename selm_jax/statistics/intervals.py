"""95 % confidence intervals of means over prompts and seeds, and of paired differences.

An interval applies to other prompts of the same kind, drawn at random, each with all its answers;
with several seeds it applies to other seeds of the method at the same time (`crossed`). With one
seed it says nothing about other seeds.

The interval is mean +- t * stderr, with Student's t (Biometrika 6, 1908), for one seed and for
several, without random numbers. tests/statistics/test_intervals.py measures its coverage. A
percentile bootstrap of a mean is narrower and has a lower coverage: it ignores how few prompts its
own spread is estimated from, and with three seeds it cannot leave the range of these three.

If the mean is a share (the mean of values from 0 to 1), the interval is that of `proportions`,
which does not shrink to a point if all prompts are won. If values are not shares and are all equal,
there is no interval, because nothing shows how far other values would differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

from selm_jax.statistics import crossed, proportions

_EQUAL = 1e-12  # relative to the values: differences below this are rounding errors


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and its 95 % interval.

    Attributes:
      mean: the mean.
      stderr: its standard error; None for a single value.
      low, high: the interval; None for a single value or equal values, unless the mean is a share.
      p: p-value of the two-sided test that the mean is 0; it is below 0.05 if and only if the
        interval excludes 0. Without an interval it is 1 if every value is 0, otherwise None. It is
        None for a share, but not for a difference of shares.
      seeds, prompts: numbers of seeds and prompts in the mean. With one seed the interval applies
        only to other prompts.
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
    """The mean over seeds and prompts, using prompts that have a finite value with every seed.

    Returns None if there are no such prompts.

    Args:
      values: one for each seed and prompt; NaN if unknown.
      share: whether the values are from 0 to 1, so that their mean is a share.
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
    """The mean of `values` minus that of `others`, paired by prompt.

    It is paired by seed too if both have the same number of seeds. It uses only prompts with a
    finite value everywhere, and returns None if there are none.

    Args:
      values, others: one for each seed and prompt; NaN if unknown.
      share: whether both are means of values from 0 to 1; their difference is from -1 to 1.
    """
    values, others = known(values, others)
    if not values.size:
        return None
    seeds, most = sorted((len(values), len(others)))
    found = crossed.difference(values, others) if most * values.shape[1] > 1 else None
    largest = max(np.abs(values).max(), np.abs(others).max())
    if seeds < most:  # compare each seed of one with the mean over the seeds of the other
        values, others = (
            x if len(x) == most else x.mean(0, keepdims=True) for x in (values, others)
        )
    return _estimate(values - others, found, largest, seeds, -1 if share else None)


def weighted(
    values: Float[np.ndarray, " clusters"], weights: Float[np.ndarray, " clusters"]
) -> Estimate:
    """The mean over answers that are clustered by question.

    The interval applies to other questions, each with all its answers. The mean is a ratio of two
    sums; its standard error is that of its `parts`, which with equal weights is the ordinary one.

    Args:
      values: the mean of each question's answers.
      weights: the number of each question's answers.
    """
    gaps = parts(values * weights, weights)[None]
    found = crossed.mean(gaps) if len(values) > 1 else None
    return _estimate(gaps, found, np.abs(values).max(), 1, None)


def parts(
    sums: Float[np.ndarray, " clusters"], sizes: Float[np.ndarray, " clusters"]
) -> Float[np.ndarray, " clusters"]:
    """The part of each cluster in the ratio of all `sums` to all `sizes`.

    Their mean is the ratio, and their standard error is that of the linearised ratio (Cochran,
    Sampling Techniques, 1977, section 6.4).
    """
    ratio = sums.sum() / sizes.sum()
    return ratio + (sums - ratio * sizes) / sizes.mean()


def stratified(
    strata: Sequence[Float[np.ndarray, " _"]],
    weights: Sequence[float],
    others: Sequence[Float[np.ndarray, " _"]] | None = None,
    *,
    share: bool = False,
) -> Estimate | None:
    """The weighted mean of the means of strata, such as several tasks, or its paired difference.

    Its standard error is that of stratified sampling, in which only prompts within a stratum vary
    (Cochran, Sampling Techniques, 1977, section 5.4). Its degrees of freedom are Welch's
    (Biometrika 34, 1947, after Satterthwaite), which are few if a stratum of few prompts has a
    large weight. A share has the interval of as many prompts as, equally weighted, would have its
    variance if all strata were alike (Kish, Survey Sampling, 1965, section 11.7).

    Returns None if a value is not finite.

    Args:
      strata: the values of each stratum's prompts, of which there are at least two: one does not
        show how much others differ.
      weights: the weight of each stratum.
      others: what to subtract from `strata`, prompt by prompt.
      share: whether the values are from 0 to 1 and the weights have a sum of 1.

    Raises:
      ValueError: a stratum has fewer than two values.
    """
    if (smallest := min(map(len, strata))) < 2:
        raise ValueError(
            f"the smallest stratum has {smallest} values; each needs two, to show how much they "
            "differ. Leave the interval out"
        )
    gaps = list(strata)
    if others is not None:
        gaps = [mine - other for mine, other in zip(strata, others, strict=True)]
    if not all(np.isfinite(values).all() for values in gaps):
        return None
    mean = sum(w * float(values.mean()) for w, values in zip(weights, gaps, strict=True))
    parts = [
        (w**2 * float(values.var(ddof=1)) / len(values), float(len(values) - 1))
        for w, values in zip(weights, gaps, strict=True)
    ]
    alike = 1 / sum(w**2 / len(values) for w, values in zip(weights, gaps, strict=True))
    around = np.concatenate([mean + (values - values.mean()) for values in gaps])
    largest = max(float(np.abs(values).max()) for values in [*strata, *(others or ())])
    lowest = (0 if others is None else -1) if share else None
    found = crossed.independent(mean, parts)
    return _estimate(around[None], found, largest, 1, lowest, alike)


def known(*tables: Float[np.ndarray, "_ prompts"]) -> list[Float[np.ndarray, "_ known"]]:
    """The tables (seeds by prompts) without prompts that have a value which is not finite."""
    there = np.logical_and.reduce([np.isfinite(table).all(axis=0) for table in tables])
    return [table[:, there] for table in tables]


def _estimate(
    gaps: Float[np.ndarray, "seeds prompts"],
    found: crossed.Mean | None,
    largest: float,
    seeds: int,
    least: int | None,
    alike: float | None = None,
) -> Estimate:
    """Makes the `Estimate` of the mean of `gaps`.

    Args:
      gaps: values or differences, by seed and prompt.
      found: their mean with its standard error; None for a single value.
      largest: the largest magnitude of the values that were subtracted.
      seeds: the number of seeds to report.
      least: the smallest possible value of a share, 0 or -1; None if the mean is not a share.
      alike: the number of equally weighted prompts that strata are worth; None without strata.
    """
    mean, prompts = float(gaps.mean()), gaps.shape[1]
    stderr = None if found is None else found.stderr
    if least is not None:
        share = _share(gaps, found, least, alike)
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
    gaps: Float[np.ndarray, "seeds prompts"],
    found: crossed.Mean | None,
    least: int,
    alike: float | None,
) -> proportions.Share:
    """Rescales values in the range from `least` to 1 to the range from 0 to 1, as a `Share`.

    With several seeds or strata, a part of the sum of squares is the constant that `proportions`
    adds. This part is known exactly, so there are more degrees of freedom (Satterthwaite) than
    `found` has.
    """
    if alike is None and len(gaps) == 1 or found is None:
        return proportions.Share.of((gaps.ravel() - least) / (1 - least))
    width, prompts = 1 - least, alike or gaps.shape[1]
    mean, squares = (found.mean - least) / width, (prompts * found.stderr / width) ** 2
    dispersion = proportions.dispersion(squares, prompts * mean * (1 - mean))
    freedom = found.freedom * (1 + proportions.ADDED / squares) ** 2 if squares else np.inf
    return proportions.Share(mean, prompts, dispersion, freedom)
