"""Says who writes the two responses of a query: exact distributions, from two sets of logits.

A sampler maps two policies (`Two`) to a mixture of pairs of independent policies (`Pairs`), and
feedback sees nothing else.

    policy_reference      one response from each: the plain online DPO of the laboratory
    policy_policy         both from the policy
    reference_reference   both from the reference: passive data
    uniform               both at random: the control
    pilaf                 (policy, policy) or (policy raised, policy lowered). arXiv 2502.04270
    dpo_mix               the same around the uniform policy. arXiv 2409.19605, DPO-Mix-P
    nash                  the policy and its geometric mixture with the reference. arXiv 2312.00886
    extremes              the best of n and the worst of n in the policy's own opinion
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from selm_jax.lab.worlds import Table
from selm_jax.rollout import mixtures


class Two(NamedTuple):
    """The two policies that a sampler is made from.

    Attributes:
      policy, reference: log-probabilities.
      lean: beta / temperature, the factor of a log-ratio in the odds of a preference.
    """

    policy: Table
    reference: Table
    lean: Any


class Pairs(NamedTuple):
    """A mixture of two products: with probability `share[0]` kind 0, with the rest kind 1."""

    first: Float[Array, "2 prompts responses"]  # log-probabilities of the first response
    second: Float[Array, "2 prompts responses"]
    share: Float[Array, "2 prompts"]

    def joint(self) -> Float[Array, "prompts first second"]:
        """The probability of each pair of responses, by prompt."""
        both = jnp.exp(self.first)[..., :, None] * jnp.exp(self.second)[..., None, :]
        return jnp.sum(self.share[..., None, None] * both, axis=0)


def mixed(policy: Table, reference: Table, weight: Any) -> Table:
    """The geometric mixture policy^(1 - weight) reference^weight; weights may leave [0, 1]."""
    return jax.nn.log_softmax(mixtures.mixed(policy, reference, weight), axis=-1)


def policy_reference(of: Two) -> Pairs:
    return _product(of.policy, of.reference)


def policy_policy(of: Two) -> Pairs:
    return _product(of.policy, of.policy)


def reference_reference(of: Two) -> Pairs:
    return _product(of.reference, of.reference)


def uniform(of: Two) -> Pairs:
    return _product(_flat(of.policy), _flat(of.policy))


def pilaf(of: Two) -> Pairs:
    """PILAF: pairs of the policy, mixed with pairs of policy^(1 +- lean) reference^(-+ lean).

    arXiv 2502.04270, with the shares of its theory; for language models, where they are not known,
    its authors use one half each.
    """
    return _around(of.policy, of)


def dpo_mix(of: Two) -> Pairs:
    """DPO-Mix-P: uniform pairs, mixed with pairs of (policy / reference)^(+- lean).

    arXiv 2409.19605, with the shares of its theory.
    """
    return _around(_flat(of.policy), of)


def nash(of: Two, weight: float = 0.5) -> Pairs:
    """Nash-MD: a response of the policy against one of its geometric mixture with the reference.

    arXiv 2312.00886; `weight` is the reference's share of the mixture.
    """
    return _product(of.policy, mixed(of.policy, of.reference, weight))


def extremes(of: Two, n: int = 4) -> Pairs:
    """The best of n responses of the policy against the worst of n others, by implicit reward.

    It asks for one label, and ranks by log(policy / reference), not by feedback. Responses of equal
    implicit reward share their probability, so at the start both are drawn from the policy.
    """
    p, score = jnp.exp(of.policy), of.policy - of.reference
    gap = score[:, :, None] - score[:, None, :]
    near = jnp.abs(gap) < 1e-5  # equal but for rounding
    same = jnp.sum(near * p[:, None, :], axis=-1)
    below = jnp.sum(((gap > 0) & ~near) * p[:, None, :], axis=-1)
    above = jnp.maximum(1 - below - same, 0)

    def last_of(fewer):
        """The log-probability that the extreme one of n responses is this one."""
        mass = (jnp.minimum(fewer + same, 1)) ** n - fewer**n
        return jax.nn.log_softmax(jnp.log(jnp.maximum(mass * p / same, 1e-30)), axis=-1)

    return _product(last_of(below), last_of(above))


def _flat(like: Table) -> Table:
    return jnp.full_like(like, -jnp.log(like.shape[-1]))


def _product(first: Table, second: Table) -> Pairs:
    share = jnp.zeros((2, len(first)), first.dtype).at[0].set(1)
    return Pairs(jnp.stack([first, first]), jnp.stack([second, second]), share)


def _around(base: Table, of: Two) -> Pairs:
    """Pairs of `base`, mixed with those of base exp(+-lean r), r the log-ratio.

    The shares are those with which an unordered pair has a density proportional to base(y) base(y')
    / (s (1 - s)), where s is the probability, by the policy's implicit reward, that y wins. The
    factor is one over the variance of the label: it undoes the weight s (1 - s) that DPO's loss
    gives to a pair, so that its mean gradient is that of the value.
    """
    up, down = (mixtures.tilted(base, of.policy, of.reference, sign * of.lean) for sign in (-1, 1))
    size = jax.nn.logsumexp(up, axis=-1) + jax.nn.logsumexp(down, axis=-1)
    tilted = (jax.nn.log_softmax(each, axis=-1) for each in (up, down))
    first, second = (jnp.stack([base, each]) for each in tilted)
    return Pairs(first, second, jnp.stack([jax.nn.sigmoid(-size), jax.nn.sigmoid(size)]))
