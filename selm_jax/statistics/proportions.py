"""The 95 % interval of a share of prompts: won, right, cut off. It is no point where all are won.

It is about other prompts, drawn at random like these; `intervals` makes it one about other seeds too.
A bootstrap of 20 wins out of 20 draws nothing but wins, and would say that the share is 1 for sure.
Wilson's interval (JASA 22, 1927) asks instead which true shares make the data likely. Here it is for
values that need not be 0 or 1: a tie is 1/2, a prompt with several answers has their mean.

Such values vary less than wins and losses with the same mean do. `dispersion` is by how much, and
the interval is Wilson's for count / dispersion prompts. To the squares that are observed, and to
those of wins and losses, it adds as many prompts as Wilson's own formula does, half won and half
lost: values that are all the same then still say something about how far others may lie from them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

Z = float(stats.norm.ppf(0.975))  # of 95 %, both sides
ADDED = Z**2 / 4  # the squared deviations of Wilson's Z**2 prompts, each 1/2 from its mean


@dataclass(frozen=True)
class Share:
    """A mean of values from 0 to 1, one for each of `count` prompts, and how far they vary.

    Attributes:
      freedom: degrees of freedom of `dispersion`; infinite where a share alone is observed.
    """

    mean: float
    count: int
    dispersion: float
    freedom: float = np.inf

    @staticmethod
    def of(
        values: Float[np.ndarray, " prompts"], weights: Float[np.ndarray, " prompts"] | None = None
    ) -> Share:
        """The share that the values, from 0 to 1, have as their mean.

        Args:
          weights: of the prompts in the mean, such as how many answers each has.
        """
        each = np.ones(len(values)) if weights is None else weights / weights.mean()
        mean = float(np.average(values, weights=each))
        observed = float(np.square(each * (values - mean)).sum())
        binary = len(values) * mean * (1 - mean)
        return Share(mean, len(values), dispersion(observed, binary))

    def interval(self) -> tuple[float, float]:
        """The ends of its 95 % interval."""
        quantile = float(stats.t.ppf(0.975, self.freedom))
        return ends(self.mean, self.count, self.dispersion, quantile)

    def p(self, value: float) -> float:
        """The two-sided test that the share is this value; below 0.05 just outside the interval."""
        error = np.sqrt(value * (1 - value) * self.dispersion / self.count)
        return float(2 * stats.t.sf(abs(self.mean - value) / error, self.freedom))


def interval(
    values: Float[np.ndarray, " prompts"], weights: Float[np.ndarray, " prompts"] | None = None
) -> tuple[float, float]:
    """The ends of the interval of the mean of values from 0 to 1 (`Share.of`)."""
    return Share.of(values, weights).interval()


def counted(scores: Iterable[float | None]) -> bool:
    """Whether all scores say right, half right or wrong: 1, 1/2 or 0. Then their mean is a share.

    None and NaN, of what a judge said unreadably, are no scores.
    """
    return all(score is None or np.isnan(score) or score in (0, 0.5, 1) for score in scores)


def dispersion(observed: float, binary: float) -> float:
    """How far values vary, of how far wins and losses with the same means would.

    Args:
      observed: the sum of squared deviations from what is expected.
      binary: the sum of p (1 - p).
    """
    return (observed + ADDED) / (binary + ADDED)


def ends(mean: float, count: float, dispersion: float, quantile: float = Z) -> tuple[float, float]:
    """Wilson's interval around a mean of so many values from 0 to 1 with this dispersion."""
    odds = quantile**2 * dispersion / count
    middle = (mean + odds / 2) / (1 + odds)
    half = np.sqrt(odds * mean * (1 - mean) + odds**2 / 4) / (1 + odds)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))
