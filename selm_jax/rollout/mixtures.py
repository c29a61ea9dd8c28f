"""Mixtures of two policies: logits from the policy's and those of its reference.

    mixed(policy, reference, weight)     policy^(1 - weight) reference^weight, not normalised

A weight between 0 and 1 interpolates, and another one extrapolates. A kind of `rollout.mixture`
says which sample of a prompt has which weight:

    geometric          all samples the same
    nash               the policy and the mixture in turns. Nash-MD, arXiv 2312.00886
    policy_reference   the policy and the reference in turns
    dpo_mix            two of the policy, one raised, one lowered, and again. DPO-Mix-P for language
                       models as in the code of arXiv 2409.19605, whose weight is 0.5
    pilaf              pairs of samples, each by the toss of a coin both of the policy, or one
                       raised and one lowered. arXiv 2502.04270, whose weight is beta

Raised is policy^(1 + weight) reference^-weight, lowered is policy^(1 - weight) reference^weight.
The laboratory takes its mixtures of whole responses from here (`lab.samplers`). A language model
mixes the distributions of the next token instead, as the authors' codes do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from selm_jax.config.kinds import MixtureKind
from selm_jax.config.rollout import Mixture


def models(mixture: Mixture | None) -> int:
    """The number of models that read every token: the policy alone, or with its reference."""
    return 1 if mixture is None else 2


def tilted(base: Any, policy: Any, reference: Any, weight: Any) -> Any:
    """Logits of base (reference / policy)^weight, from three logits or log-probabilities.

    >>> tilted(jnp.zeros(2), jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]), -0.5).tolist()
    [0.0, -1.0]
    """
    return base + weight * (reference - policy)


def mixed(
    policy: Float[Array, "*batch vocab"],
    reference: Float[Array, "*batch vocab"],
    weight: Float[Array, "*batch 1"] | float,
) -> Float[Array, "*batch vocab"]:
    """Logits of the geometric mixture policy^(1 - weight) reference^weight.

    Equal logits are returned as they are, and so are those of the reference if its weight is 1.

    >>> p, r = jnp.log(jnp.array([0.5, 0.5])), jnp.log(jnp.array([0.2, 0.8]))
    >>> jnp.exp(mixed(p, r, 0.5)).round(4).tolist()  # sqrt(0.5 * 0.2), sqrt(0.5 * 0.8)
    [0.3162, 0.6325]
    """
    return jnp.where(weight == 1, reference, tilted(policy, policy, reference, weight))


# For each kind, the weights of samples 1, 2, ... that are repeated; one of two by a coin.
_WEIGHTS: Mapping[MixtureKind, Callable[[float], tuple[tuple[float, ...], ...]]] = {
    "geometric": lambda w: ((w,),),
    "nash": lambda w: ((0.0, w),),
    "policy_reference": lambda _: ((0.0, 1.0),),
    "dpo_mix": lambda w: ((0.0, 0.0, -w, w),),
    "pilaf": lambda w: ((0.0, 0.0), (-w, w)),
}


def weight_of(mixture: Mixture, sample: int, coin: Callable[[int], int]) -> float:
    """The reference's weight in the mixture that a sample is drawn from.

    Args:
      sample: the number of the sample within its prompt, from 1; 0 is the greedy answer, which is
        the policy's own.
      coin: returns 0 or 1 for a sample's number; it is tossed once for a pair of samples.

    >>> from selm_jax.config.rollout import Mixture
    >>> [weight_of(Mixture("nash", 0.3), sample, lambda _: 0) for sample in range(5)]
    [0.0, 0.0, 0.3, 0.0, 0.3]
    >>> [weight_of(Mixture("pilaf", 0.1), n, lambda first: first == 3) for n in (1, 2, 3, 4)]
    [0.0, 0.0, -0.1, 0.1]
    """
    if sample == 0:
        return 0.0
    ways = _WEIGHTS[mixture.kind](1.0 if mixture.weight is None else mixture.weight)
    first_of_pair = sample - 1 + sample % 2
    weights = ways[coin(first_of_pair) if len(ways) > 1 else 0]
    return weights[(sample - 1) % len(weights)]
