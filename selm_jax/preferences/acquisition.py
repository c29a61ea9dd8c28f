"""Which prompts are worth asking about, when answers cost: pure functions of log-probabilities.

An acquisition gives every prompt one value; those with the highest are asked until the budget is
spent. The log-probabilities are those of the candidates that exist already; nothing is generated
for them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from selm_jax.preferences.candidates import FeedbackError


@dataclass(frozen=True)
class Prospect:
    """What is known of a prompt before anybody is asked.

    Attributes:
        policy: log-probability of every candidate under the policy that generated, in nats.
        reference: the same under that policy's own reference.
        drawn: which candidates are draws from the policy; the greedy answer and the data's are not.
    """

    policy: Float[np.ndarray, " candidates"]
    reference: Float[np.ndarray, " candidates"]
    drawn: Bool[np.ndarray, " candidates"]

    def __post_init__(self) -> None:
        shapes = {self.policy.shape, self.reference.shape, self.drawn.shape}
        finite = np.isfinite(self.policy).all() and np.isfinite(self.reference).all()
        if len(shapes) > 1 or not finite or not len(self.policy):
            raise FeedbackError(
                f"a prompt's log-probabilities are {self.policy} and {self.reference}, with "
                f"{self.drawn} drawn; expected as many finite numbers of each, at least one."
            )


def reward_gap(prospect: Prospect) -> float:
    """The largest difference of implicit rewards between two candidates, over beta.

    Source: Muldrew et al. (2024), "Active Preference Learning for Large Language Models", arXiv
    2402.08114, preference certainty of the implicit Bradley-Terry model: |r(x, y1) - r(x, y2)|
    with r = beta log(policy / reference). They ask where it is largest: where the policy is sure,
    and wrong if the answer says so. Without a step away from the reference it is 0 everywhere.
    """
    ratio = prospect.policy - prospect.reference
    return float(ratio.max() - ratio.min())


def entropy(prospect: Prospect) -> float:
    """The policy's entropy on the prompt, in nats: the mean of -log policy over its draws.

    Source: arXiv 2402.08114, predictive entropy, estimated by the draws that there are. It is the
    entropy at temperature 1 if the draws were made so. Without draws all candidates stand in.
    """
    drawn = prospect.drawn if prospect.drawn.any() else np.ones_like(prospect.drawn)
    return float(-prospect.policy[drawn].mean())


MODEL_BASED: Mapping[str, Callable[[Prospect], float]] = {
    "reward_gap": reward_gap,
    "entropy": entropy,
}


def best(
    values: Sequence[float] | Float[np.ndarray, " prompts"],
    budget: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, " asked"]:
    """The prompts with the highest values, as rising indices.

    Args:
        values: `[prompts]`, finite. All equal (the acquisition `random`) is a uniform draw.
        budget: how many at most.
        rng: decides among equal values.

    Raises:
        FeedbackError: a value that is not finite, or a budget below 1.

    >>> best([0.1, 0.9, 0.5], budget=2, rng=np.random.default_rng(0)).tolist()
    [1, 2]
    """
    known = np.asarray(values, np.float64)
    if not np.isfinite(known).all():
        raise FeedbackError(f"values of prompts are {values!r}; expected finite numbers.")
    if budget < 1:
        raise FeedbackError(f"the budget is {budget} prompts; expected at least 1.")
    order = rng.random(len(known))
    return np.sort(np.lexsort((order, -known))[:budget])
