"""Importance weights for answers that another policy or engine gave than the one in training.

    d = log p_scorer(token) - log p_sampler(token)          both at temperature 1, without filters
    token level:     rho = exp(d)                           of each token
    sequence level:  rho = exp(sum of d)                    over all the policy's answers of a pair
    truncated:       w = min(rho, cap)                      TIS
    masked:          w = rho if floor <= rho <= cap, else 0   IcePop (token), MIS (sequence)

Sources: TIS, Yao et al., "Your efficient RL framework secretly brings you off-policy RL training"
(2025, https://fengyao.notion.site/off-policy-rl); IcePop, the Ling team (2025); masking at the
sequence level, and the names of the modes, as in TRL's GRPO. That a pair has the product of its
answers' ratios is as in WPO (arXiv 2406.11827): it is the ratio of two answers drawn independently.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from selm_jax.config import Importance

_LARGEST = 700.0  # the largest exponent: beyond it, a float64 overflows


class Weights(NamedTuple):
    """The weights of an example's tokens, and the ratios that they are made of.

    Attributes:
      weights: float64 [tokens], for each response.
      ratios: rho, one for each token of the policy's responses, or one for the example; none if no
        response is the policy's.
      outside: whether rho is above `cap`, or masked, likewise.
    """

    weights: tuple[np.ndarray, ...]
    ratios: np.ndarray
    outside: np.ndarray


def weights_of(
    how: Importance, differences: Sequence[np.ndarray], of_policy: Sequence[bool]
) -> Weights:
    """The weights of an example.

    Args:
      differences: d of each token of each response, [tokens]; zeros for a response that the policy
        did not give, such as the data set's, whose weight is 1.
      of_policy: whether each response is the policy's.

    >>> differences = [np.log([0.5, 4.0]), np.zeros(1)]
    >>> cut = weights_of(Importance(mode="token_truncate", cap=2.0), differences, [True, False])
    >>> [w.round(3).tolist() for w in cut.weights], cut.outside.tolist()
    ([[0.5, 2.0], [1.0]], [False, True])
    >>> masked = weights_of(Importance(mode="sequence_mask", cap=3.0), differences, [True, False])
    >>> [w.round(3).tolist() for w in masked.weights], masked.outside.tolist()
    ([[2.0, 2.0], [2.0]], [False])
    """
    lengths, d = [len(each) for each in differences], np.concatenate(differences)
    level, _, treatment = how.mode.partition("_")
    ratios = np.exp(np.minimum(d if level == "token" else d.sum(keepdims=True), _LARGEST))
    if treatment == "mask":
        outside = (ratios > how.cap) | (ratios < how.floor)
        weights = np.where(outside, 0.0, ratios)
    else:
        outside = ratios > how.cap
        weights = np.minimum(ratios, how.cap)
    of_responses = np.split(np.broadcast_to(weights, d.shape), np.cumsum(lengths)[:-1])
    counted = np.repeat(of_policy, lengths) if level == "token" else np.array([any(of_policy)])
    return Weights(tuple(of_responses), ratios[counted], outside[counted])


def metrics_of(found: Sequence[Weights]) -> dict[str, float]:
    """The mean ratio and the share of ratios outside, over the policy's tokens or its examples."""
    return {
        "importance/ratio": float(np.mean(np.concatenate([each.ratios for each in found]))),
        "importance/outside": float(np.mean(np.concatenate([each.outside for each in found]))),
    }
