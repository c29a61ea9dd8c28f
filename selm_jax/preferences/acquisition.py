"""Acquisition functions, which choose the prompts to rank if a budget does not cover all.

Most acquisitions give every prompt one value, and the prompts with the highest values are asked
until the budget is spent. Values are pure functions of the log-probabilities of the candidates that
exist already; nothing more is generated. A design (`d_optimal`) chooses prompts as a set instead.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from selm_jax.preferences.candidates import FeedbackError


@dataclass(frozen=True)
class Prospect:
    """Holds what is known about a prompt before its candidates are ranked.

    Attributes:
        policy: log-probability of every candidate under the policy that generated, in nats.
        reference: log-probability of every candidate under that policy's reference, in nats.
        drawn: which candidates were sampled from the policy (not greedy, not from the data).
    """

    policy: Float[np.ndarray, " candidates"]
    reference: Float[np.ndarray, " candidates"]
    drawn: Bool[np.ndarray, " candidates"]

    def __post_init__(self) -> None:
        shapes = {self.policy.shape, self.reference.shape, self.drawn.shape}
        finite = np.isfinite(self.policy).all() and np.isfinite(self.reference).all()
        if len(shapes) > 1 or not finite or not len(self.policy):
            raise FeedbackError(
                f"a prompt's log-probabilities are {self.policy} (policy) and {self.reference} "
                f"(reference), and `drawn` is {self.drawn}; expected one finite number of each for "
                "every candidate, and at least one candidate."
            )


def reward_gap(prospect: Prospect) -> float:
    """The largest difference of implicit rewards between candidates, divided by beta.

    Source: Muldrew et al. (2024), "Active Preference Learning for Large Language Models", arXiv
    2402.08114, preference certainty of the implicit Bradley-Terry model: |r(x, y1) - r(x, y2)|
    with r = beta log(policy / reference). They ask about the prompts where the gap is largest:
    there the policy is sure, and an answer that disagrees teaches most. While the policy equals the
    reference, the gap is 0 for every prompt.
    """
    ratio = prospect.policy - prospect.reference
    return float(ratio.max() - ratio.min())


def entropy(prospect: Prospect) -> float:
    """The policy's entropy on the prompt, in nats: the mean of -log policy over its samples.

    Source: arXiv 2402.08114, predictive entropy, estimated from the existing samples. It estimates
    the entropy at temperature 1 if the samples were drawn at temperature 1. Without samples, the
    mean is taken over all candidates.
    """
    drawn = prospect.drawn if prospect.drawn.any() else np.ones_like(prospect.drawn)
    return float(-prospect.policy[drawn].mean())


MODEL_BASED: Mapping[str, Callable[[Prospect], float]] = {
    "reward_gap": reward_gap,
    "entropy": entropy,
}


def widest(features: Sequence[Float[np.ndarray, " embed"]]) -> Float[np.ndarray, " embed"]:
    """The difference between the features of the two candidates of a prompt that differ most.

    Raises:
      FeedbackError: there is no candidate.
    """
    if not len(features):
        raise FeedbackError(
            "a prompt has no candidate with token ids, so d_optimal has no features of it. Ask for "
            "the policy's own answers with candidates.samples, or set feedback.acquisition: random"
        )
    of = np.array(features, np.float64)
    square = (of * of).sum(axis=1)
    distance = square[:, None] + square - 2 * of @ of.T
    a, b = np.unravel_index(distance.argmax(), distance.shape)
    return of[a] - of[b]


def d_optimal(
    differences: Float[np.ndarray, "prompts embed"], budget: int, rng: np.random.Generator
) -> Int[np.ndarray, " asked"]:
    """The indices of the prompts of a greedy D-optimal design, in increasing order.

    Source: arXiv 2503.01076: if a policy is linear in its last layer's features, the answer to a
    comparison of two candidates with the feature difference x adds a multiple of x x^T to the
    information about it. Each step asks about the prompt that raises log det(s I + sum x x^T) most.
    The multiple, which depends on how sure the policy is, is taken as equal for all prompts. s, the
    mean square of x divided by the number of features, stands for what is known before.

    Args:
      differences: x of each prompt (`widest`).
      budget: the largest number of prompts.
      rng: decides among prompts of equal gain.

    Raises:
      FeedbackError: a difference is not finite, or the budget is below 1.
    """
    x = np.asarray(differences, np.float64)
    if not np.isfinite(x).all():
        raise FeedbackError("a candidate's features are not finite. Check the policy's weights")
    if budget < 1:
        raise FeedbackError(f"the budget is {budget} prompts; expected at least 1.")
    order = rng.permutation(len(x))
    x = x[order] / np.sqrt(max(np.mean(x * x), np.finfo(np.float64).tiny))  # so that s is 1
    gain = (x * x).sum(axis=1)  # x^T A^-1 x, where A is the information so far
    chosen: list[int] = []
    steps: list[Float[np.ndarray, " embed"]] = []  # A^-1 = I - sum of v v^T over these
    for _ in range(min(budget, len(x))):
        i = int(np.argmax(gain))
        v = x[i] - sum((step * (step @ x[i]) for step in steps), np.zeros(x.shape[1]))
        v /= np.sqrt(1 + v @ x[i])
        steps.append(v)
        gain -= (x @ v) ** 2
        chosen.append(i)
        gain[chosen] = -np.inf
    return np.sort(order[chosen])


DESIGNS = ("d_optimal",)
READ_MODEL = (*MODEL_BASED, *DESIGNS)  # the acquisitions that evaluate the policy


def best(
    values: Sequence[float] | Float[np.ndarray, " prompts"],
    budget: int,
    rng: np.random.Generator,
) -> Int[np.ndarray, " asked"]:
    """The indices of the prompts with the highest values, in increasing order.

    Args:
        values: `[prompts]`, finite. If all are equal (the acquisition `random`), the prompts are
            drawn uniformly.
        budget: the largest number of prompts.
        rng: decides among equal values.

    Raises:
        FeedbackError: if a value is not finite, or the budget is below 1.

    >>> best([0.1, 0.9, 0.5], budget=2, rng=np.random.default_rng(0)).tolist()
    [1, 2]
    """
    known = np.asarray(values, np.float64)
    if not np.isfinite(known).all():
        raise FeedbackError(f"the prompts' values are {values!r}; expected finite numbers.")
    if budget < 1:
        raise FeedbackError(f"the budget is {budget} prompts; expected at least 1.")
    order = rng.random(len(known))
    return np.sort(np.lexsort((order, -known))[:budget])
