"""The standard error of a mean over seeds and prompts that are both drawn at random.

A method is run with several seeds and answers the same held-out prompts each time, which gives a
table of one value for each (seed, prompt). Its mean would differ with other seeds, which train
other models, and with other prompts. Seeds and prompts are crossed random factors; the standard
error takes both into account (random two-way analysis of variance; degrees of freedom by
Satterthwaite, Biometrics Bulletin 2, 1946). With one seed, or with one prompt, it is Student's.

With three seeds the interval contains the true value in 93 to 98 of 100 cases, whichever factor
varies more (tests/statistics/test_intervals.py); an interval over prompts alone would not. Two
seeds are too few: 84 of 100 cases if seeds differ much.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Mean(NamedTuple):
    """A mean, its standard error, and the degrees of freedom of the standard error."""

    mean: float
    stderr: float
    freedom: float


def mean(values: Float[np.ndarray, "seeds prompts"]) -> Mean:
    """The mean over seeds and prompts, with its standard error.

    With values = m + seed + prompt + rest, independent, the mean's variance is
    (MS_seed + MS_prompt - MS_rest) / (seeds * prompts). We never use less than MS_seed or MS_prompt
    alone would give, so that a negative estimate of a component does not narrow the interval. If
    all seeds and all prompts have the same mean, we use MS_rest.

    Raises:
      ValueError: if there are fewer than two values, or some are not finite.
    """
    if values.ndim != 2 or values.size < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"values have shape {values.shape} and {np.isfinite(values).sum()} of them are finite; "
            "expected a table, by seed and prompt, of at least 2 values, all finite"
        )
    variance, freedom = _variance(values)
    return Mean(float(values.mean()), variance**0.5, freedom)


def difference(
    values: Float[np.ndarray, "seeds prompts"], others: Float[np.ndarray, "other_seeds prompts"]
) -> Mean:
    """The mean of `values` minus that of `others`, paired by prompt.

    If both have the same number of seeds, these are paired too: seed i of one method belongs to
    seed i of the other. Otherwise the seeds are independent, and the variances of the prompts and
    of the seeds of either method are added. Each table's residual variance is then counted twice,
    so the interval is a little too wide, but never too narrow.
    """
    if len(values) == len(others):
        return mean(values - others)
    by_prompt = values.mean(0) - others.mean(0)
    samples = [by_prompt, *(each.mean(1) for each in (values, others))]
    parts = [(float(x.var(ddof=1)) / len(x), len(x) - 1) for x in samples if len(x) > 1]
    return independent(float(by_prompt.mean()), parts)


def independent(mean: float, parts: Sequence[tuple[float, float]]) -> Mean:
    """A mean whose variance is the sum of independent estimates.

    Args:
      parts: each estimated variance with its degrees of freedom.
    """
    total = sum(part for part, _ in parts)
    return Mean(mean, total**0.5, _freedom(total, parts) if total else 1.0)


def _freedom(variance: float, parts: Iterable[tuple[float, float]]) -> float:
    """The degrees of freedom of a sum or difference of estimated variances (Satterthwaite)."""
    return variance**2 / sum(part**2 / free for part, free in parts)


def _variance(values: Float[np.ndarray, "seeds prompts"]) -> tuple[float, float]:
    """The variance of the mean of `values`, and the variance's degrees of freedom."""
    seeds, prompts = values.shape
    by_seed, by_prompt = values.mean(1), values.mean(0)
    if seeds == 1 or prompts == 1:
        only = by_prompt if seeds == 1 else by_seed
        return float(only.var(ddof=1) / len(only)), len(only) - 1
    rest = values - by_seed[:, None] - by_prompt + values.mean()
    count, free = values.size, ((seeds - 1), (prompts - 1), (seeds - 1) * (prompts - 1))
    of_seed = prompts * float(by_seed.var(ddof=1)) / count
    of_prompt = seeds * float(by_prompt.var(ddof=1)) / count
    of_rest = float(np.square(rest).sum()) / free[2] / count
    total = of_seed + of_prompt - of_rest
    if total <= max(of_seed, of_prompt):
        most = max((of_seed, float(free[0])), (of_prompt, float(free[1])))
        return most if most[0] > 0 else (of_rest, float(free[2]))
    parts = zip((of_seed, of_prompt, of_rest), free, strict=True)
    return total, _freedom(total, parts)
