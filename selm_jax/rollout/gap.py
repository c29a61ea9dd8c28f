"""How far the sampler's log-probabilities of answers are from the scorer's.

Both are of the same tokens after the same prompts, under the policy at temperature 1 and without
filters, so they are equal but for rounding if sampler and scorer have the same weights. They differ
if a server serves other weights, computes in another precision, or reads another prompt.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Gap(NamedTuple):
    """The difference d = log p_scorer(token) - log p_sampler(token), in nats per token.

    Attributes:
      tokens: the number of tokens that are compared.
      mean: the mean of |d|.
      largest: the largest |d|.
      k3: the mean of exp(d) - 1 - d, which is never negative. Over tokens that were sampled at
        temperature 1 without filters it estimates KL(sampler || scorer) (Schulman,
        "Approximating KL divergence", http://joschu.net/blog/kl-approx.html).
    """

    tokens: int
    mean: float
    largest: float
    k3: float

    @property
    def metrics(self) -> dict[str, float]:
        return {
            "gap/tokens": self.tokens,
            "gap/mean": self.mean,
            "gap/largest": self.largest,
            "gap/k3": self.k3,
        }


def gap_of(answers: Iterable[tuple[np.ndarray, np.ndarray]]) -> Gap | None:
    """The gap over all tokens of answers; None if there are none.

    Args:
      answers: (the sampler's log-probabilities, the scorer's) of each answer's tokens. A token of
        which the sampler said nothing, NaN, is left out.

    With the probabilities 1/2 and 1/4 in place of 1/2 and 1/2, half of the tokens are off by log 2:

    >>> sampler, scorer = np.log([0.5, 0.5]), np.log([0.5, 0.25])
    >>> found = gap_of([(sampler, scorer)])
    >>> found.tokens, round(found.mean, 4), round(found.largest, 4), round(found.k3, 4)
    (2, 0.3466, 0.6931, 0.0966)
    """
    d = np.concatenate([np.zeros(0), *(_differences(*each) for each in answers)])
    if not len(d):
        return None
    k3 = np.mean(np.expm1(d) - d)
    return Gap(len(d), float(np.abs(d).mean()), float(np.abs(d).max()), float(k3))


def _differences(sampler: np.ndarray, scorer: np.ndarray) -> np.ndarray:
    d = np.asarray(scorer, np.float64) - np.asarray(sampler, np.float64)
    return d[~np.isnan(sampler)]
