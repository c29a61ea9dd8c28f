"""The 95 % interval of a share of prompts: won, right, cut off. It is no point where all are won.

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

import numpy as np
from jaxtyping import Float

Z = 1.959963984540054  # of 95 %, both sides
ADDED = Z**2 / 4  # the squared deviations of Wilson's Z**2 prompts, each 1/2 from its mean


def interval(
    values: Float[np.ndarray, " prompts"], weights: Float[np.ndarray, " prompts"] | None = None
) -> tuple[float, float]:
    """The ends of the interval of the mean of values from 0 to 1, one for each prompt.

    Args:
      weights: of the prompts in the mean, such as how many answers each has.
    """
    each = np.ones(len(values)) if weights is None else weights / weights.mean()
    mean = float(np.average(values, weights=each))
    observed = float(np.square(each * (values - mean)).sum())
    return ends(mean, len(values), dispersion(observed, len(values) * mean * (1 - mean)))


def difference(gaps: Float[np.ndarray, " prompts"]) -> tuple[float, float]:
    """Likewise of the mean of differences between two such values, which are from -1 to 1."""
    low, high = interval((1 + gaps) / 2)
    return 2 * low - 1, 2 * high - 1


def counted(scores: Iterable[float | None]) -> bool:
    """Whether all scores say right, half right or wrong: 1, 1/2 or 0. Then their mean is a share."""
    return set(scores) <= {0, 0.5, 1}


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
