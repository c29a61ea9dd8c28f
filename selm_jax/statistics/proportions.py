"""The 95 % interval of a share, such as that of prompts won, which has a width even at 0 and 1.

The interval applies to other prompts drawn at random; `intervals` extends it to other seeds. A
bootstrap of 20 wins out of 20 draws only wins, and would say that the share is certainly 1.
Wilson's interval (JASA 22, 1927) contains instead all true shares under which the data is likely.
Here it is extended to values between 0 and 1: a tie is 1/2, and a prompt with several answers has
their mean.

Such values vary less than wins and losses with the same mean. `dispersion` is the ratio of the two
variances, and the interval is Wilson's for count / dispersion prompts. To the sums of squares of
both, it adds as many prompts as Wilson's own formula does, half won and half lost, so that the
interval has a width even if all values are equal.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import stats

Z = float(stats.norm.ppf(0.975))  # quantile for a two-sided 95 % interval
ADDED = Z**2 / 4  # the squared deviations of Wilson's Z**2 prompts, each 1/2 from its mean


@dataclass(frozen=True)
class Share:
    """The mean of values from 0 to 1, one for each of `count` prompts, and their dispersion.

    Attributes:
      mean: the share.
      count: number of prompts; of weighted strata that of equally weighted prompts.
      dispersion: see the function `dispersion`.
      freedom: degrees of freedom of `dispersion`; infinite if only a share is observed.
    """

    mean: float
    count: float
    dispersion: float
    freedom: float = np.inf

    @staticmethod
    def of(
        values: Float[np.ndarray, " prompts"], weights: Float[np.ndarray, " prompts"] | None = None
    ) -> Share:
        """Makes a `Share` from values between 0 and 1; the share is their mean.

        Args:
          values: one for each prompt.
          weights: of the prompts in the mean, such as the number of answers of each.
        """
        each = np.ones(len(values)) if weights is None else weights / weights.mean()
        mean = float(np.average(values, weights=each))
        observed = float(np.square(each * (values - mean)).sum())
        binary = len(values) * mean * (1 - mean)
        return Share(mean, len(values), dispersion(observed, binary))

    def interval(self) -> tuple[float, float]:
        """The lower and upper end of the 95 % interval."""
        quantile = float(stats.t.ppf(0.975, self.freedom))
        return ends(self.mean, self.count, self.dispersion, quantile)

    def p(self, value: float) -> float:
        """The p-value of the two-sided test that the share is `value`.

        It is below 0.05 if and only if `value` is outside the interval.
        """
        error = np.sqrt(value * (1 - value) * self.dispersion / self.count)
        return float(2 * stats.t.sf(abs(self.mean - value) / error, self.freedom))


def interval(
    values: Float[np.ndarray, " prompts"], weights: Float[np.ndarray, " prompts"] | None = None
) -> tuple[float, float]:
    """The lower and upper end of the 95 % interval for the mean of values between 0 and 1."""
    return Share.of(values, weights).interval()


def counted(scores: Iterable[float | None]) -> bool:
    """Says whether all scores are 1, 1/2 or 0 (right, half right, wrong): their mean is a share.

    None and NaN, for unreadable answers of a judge, are ignored.
    """
    return all(score is None or np.isnan(score) or score in (0, 0.5, 1) for score in scores)


def dispersion(observed: float, binary: float) -> float:
    """The variance of scores, divided by the variance of pure wins and losses of equal mean.

    Args:
      observed: the sum of squared deviations from the expected values.
      binary: the sum of p (1 - p) over the prompts.
    """
    return (observed + ADDED) / (binary + ADDED)


def ends(mean: float, count: float, dispersion: float, quantile: float = Z) -> tuple[float, float]:
    """The ends of Wilson's interval for a mean of `count` values in [0, 1], given a dispersion."""
    odds = quantile**2 * dispersion / count
    middle = (mean + odds / 2) / (1 + odds)
    half = np.sqrt(odds * mean * (1 - mean) + odds**2 / 4) / (1 + odds)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))
