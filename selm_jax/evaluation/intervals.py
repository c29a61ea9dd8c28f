"""Means over prompts, and over seeds where there are several, with bootstrap intervals.

What is drawn again is whole: a prompt brings along all its answers of all seeds, a seed all its
prompts. Prompts and seeds are drawn independently of each other (the pigeonhole bootstrap: Owen,
"The pigeonhole bootstrap", Annals of Applied Statistics 1, 2007), so that an interval over several
seeds speaks of new prompts and of new seeds. Of S seeds S - 1 are drawn, which makes the spread of
the bootstrap means that of an unbiased estimate (Rao and Wu, JASA 83, 1988); with few seeds even
that interval is an optimistic one, which is why tables list every seed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

RESAMPLES = 4999
_BLOCK = 512  # resamples at a time


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error, and its 95 % percentile interval."""

    mean: float
    stderr: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def pooled(values: Float[np.ndarray, "seeds prompts"], seed: int = 0) -> Estimate:
    """The mean of all values, by the bootstrap described above."""
    seeds, prompts = values.shape
    if prompts < 2 or np.ptp(values) == 0:
        mean = float(values.mean())
        return Estimate(mean, 0.0 if prompts > 1 else float("nan"), mean, mean)
    rng = np.random.default_rng(seed)
    drawn = max(1, seeds - 1)
    means = []
    for start in range(0, RESAMPLES, _BLOCK):
        count = min(_BLOCK, RESAMPLES - start)
        by_prompt = rng.multinomial(prompts, np.full(prompts, 1 / prompts), count) / prompts
        by_seed = rng.multinomial(drawn, np.full(seeds, 1 / seeds), count) / drawn
        means.append(np.sum((by_seed @ values) * by_prompt, axis=1))
    found = np.concatenate(means)
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(float(values.mean()), float(found.std(ddof=1)), float(low), float(high))
