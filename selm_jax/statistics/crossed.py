"""What a number per seed and prompt says about other seeds and other prompts.

A method is run with several seeds and answers the same held-out prompts each time: a table of one
value for each (seed, prompt). Its mean varies because other seeds would have trained other models
and because other prompts would have been asked. Both are drawn at random, and crossed; the standard
error here is about both (the random two-way analysis of variance; degrees of freedom by
Satterthwaite, Biometrics Bulletin 2, 1946). With one seed, or with one prompt, it is Student's.

With three seeds the interval holds the truth in 93 to 98 of 100 cases, whatever varies most
(tests/statistics/test_intervals.py); an interval over prompts alone would not. Two seeds are too
few: 84, where these differ much.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Mean(NamedTuple):
    """A mean with its standard error, and the degrees of freedom of that."""

    mean: float
    stderr: float
    freedom: float


def mean(values: Float[np.ndarray, "seeds prompts"]) -> Mean:
    """The mean over seeds and prompts.

    With values = m + seed + prompt + rest, independent, the mean's variance is
    (MS_seed + MS_prompt - MS_rest) / (seeds * prompts). It is never taken to be less than either of
    the first two alone gives, so that a negative estimate of a component narrows nothing; where seeds
    and prompts all have one mean, it is the rest's.

    Raises:
      ValueError: no values, values that are not finite, or a single one.
    """
    if values.ndim != 2 or values.size < 2 or not np.isfinite(values).all():
        raise ValueError(
            f"values have shape {values.shape} and {np.isfinite(values).sum()} of them are finite; "
            "give a table of at least 2 finite values, by seed and prompt"
        )
    variance, freedom = _variance(values)
    return Mean(float(values.mean()), variance**0.5, freedom)


def difference(
    values: Float[np.ndarray, "seeds prompts"], others: Float[np.ndarray, "other_seeds prompts"]
) -> Mean:
    """The mean of `values` minus that of `others`, paired by prompt.

    With equally many seeds they are paired too: seed i of one method was trained as seed i of the
    other. Else the seeds of each are drawn by themselves, and the variances of prompts and of
    either's seeds add up. The rest of each table is then counted in two of them: the interval is a
    little too wide, never too narrow.
    """
    if len(values) == len(others):
        return mean(values - others)
    by_prompt = values.mean(0) - others.mean(0)
    samples = [by_prompt, *(each.mean(1) for each in (values, others))]
    parts = [(float(x.var(ddof=1)) / len(x), len(x) - 1) for x in samples if len(x) > 1]
    total = sum(part for part, _ in parts)
    freedom = total**2 / sum(part**2 / free for part, free in parts) if total else 1.0
    return Mean(float(by_prompt.mean()), total**0.5, freedom)


def _variance(values: Float[np.ndarray, "seeds prompts"]) -> tuple[float, float]:
    """The variance of the mean, and its degrees of freedom."""
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
    return total, total**2 / sum(part**2 / f for part, f in parts)
