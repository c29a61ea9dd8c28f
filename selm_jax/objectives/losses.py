"""The losses that training minimises, as pure functions of log-probabilities.

A response's log-probability is the sum over its tokens, in nats. A response plays a role: `chosen`
(y_w), `rejected` (y_l), or `explore` (y_ref, sampled from the reference policy). With

    r(role) = log pi(response) - log pi_ref(response)     the log-ratio; beta * r: implicit reward
    h       = r(chosen) - r(rejected)                     the margin

SELM (arXiv 2405.19332, equation 4.2) minimises

    loss = -log sigmoid(beta * h)  +  alpha * beta * r(explore)               selm = dpo + optimism

so that descent LOWERS the likelihood of what the reference would say anyway: that is the optimism.

An objective maps `Logps` to one loss per example and named metrics per example; the update averages
both. An objective that trains a reward model (`bradley_terry`) maps `Rewards` instead. A YAML file
names an objective, a sum of several, or your own function: see `build.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import flax.struct
import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, relu
from jaxtyping import Array, Float

from selm_jax.objectives.roles import CHOSEN, EXPLORE, PAIR, REJECTED, ROLES
from selm_jax.shell.ranges import Range

CONVENTIONS = ("alpha_beta", "alpha")

PerExample = Float[Array, " examples"]
Metrics = dict[str, PerExample]


class ObjectiveError(ValueError):
    """An objective cannot be built, or the batch lacks something that it needs."""


@flax.struct.dataclass
class Logps:
    """Everything that a loss can use from its batch: float32 values per example, keyed by role."""

    policy: dict[str, PerExample]
    reference: dict[str, PerExample]
    lengths: dict[str, PerExample]  # scored tokens per response
    # Mean number of tokens over ALL examples of the update, not only this microbatch: a mean over
    # tokens would otherwise be wrong when an update is accumulated from microbatches.
    mean_lengths: dict[str, Float[Array, ""]]

    def log_ratio(self, role: str) -> PerExample:
        """The log-ratio log pi - log pi_ref, in nats. No gradient flows through the reference."""
        return self.policy[role] - jax.lax.stop_gradient(self.reference[role])

    def log_ratio_per_token(self, role: str) -> PerExample:
        # An empty response counts as one token, as in TRL: 0/0 would poison the whole update.
        return self.log_ratio(role) / jnp.maximum(self.lengths[role], 1)

    def policy_per_token(self, role: str) -> PerExample:
        return self.policy[role] / jnp.maximum(self.lengths[role], 1)

    @property
    def given(self) -> dict[str, PerExample]:
        """The policy's log-probabilities, keyed by the roles that the batch has."""
        return self.policy


@flax.struct.dataclass
class Rewards:
    """Everything that a reward model's loss can use from its batch: one number per response."""

    model: dict[str, PerExample]  # r(prompt, response) by the model in training
    scores: dict[str, PerExample]  # the responses' scores in the data; 0 if it has none

    @property
    def given(self) -> dict[str, PerExample]:
        return self.model


LossFunction = Callable[..., tuple[PerExample, Metrics]]
Score = Callable[[Logps, str], PerExample]


@dataclass(frozen=True)
class Objective:
    """A loss and the roles that it needs; call it with `Logps` to get (losses, metrics).

    With `rates`, it is called with `Rewards` instead and trains a reward model. `terms` are its
    names under `loss/`. `reward` describes in words what its `rewards/...` metrics are; None leaves
    it open. `compose` reads both. With `reference_free`, the loss does not use the reference, so
    the reference is not scored. `beta` scales the implicit rewards that are measured for every
    objective (`measures`). Calling it raises ObjectiveError if the batch lacks a role, or if
    `function` does not return one number per example.
    """

    roles: tuple[str, ...]
    function: LossFunction
    terms: tuple[str, ...] = ()
    reward: str | None = None
    reference_free: bool = False
    rates: bool = False
    beta: float = 1.0

    def __post_init__(self):
        if not self.roles or not set(self.roles) <= set(ROLES):
            raise ObjectiveError(f"{self} has roles {self.roles}; expected one or more of {ROLES}")

    def __call__(self, batch: Logps | Rewards) -> tuple[PerExample, Metrics]:
        given = batch.given
        if absent := [role for role in self.roles if role not in given]:
            has = ", ".join(given)
            raise ObjectiveError(f"{self} needs the roles {', '.join(absent)}; the batch has {has}")
        found = self.function(batch)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
            raise ObjectiveError(
                f"{self} returned a {type(found).__name__}. Return two things: one loss per "
                "example, and a dictionary of metrics, which may be empty"
            )
        losses, metrics = found
        expected = given[self.roles[0]].shape
        for name, value in {"the loss": losses, **metrics}.items():
            if jnp.shape(value) != expected:
                raise ObjectiveError(
                    f"{self}: {name} has shape {jnp.shape(value)}, expected {expected}. Return one "
                    "number per example, not their mean: the update takes the mean itself"
                )
        return losses, metrics

    def __str__(self) -> str:
        return "objective " + ("+".join(self.terms) or getattr(self.function, "__name__", "?"))


# The losses. In the formulas, e is label_smoothing: the probability that a label is wrong.


def dpo(beta: float) -> Objective:
    """DPO: -log sigmoid(beta h), h the log-ratio margin. arXiv 2305.18290 eq. 7; TRL "sigmoid"."""
    _check(beta=beta)
    return _pair("dpo", beta, lambda h: -log_sigmoid(beta * h))


def cdpo(beta: float, label_smoothing: float) -> Objective:
    """Conservative DPO: label smoothing e (Mitchell, "A note on DPO with noisy preferences", 2023).

    -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h); TRL's smoothed "sigmoid" up to 0.28.
    """
    _check(beta=beta, label_smoothing=label_smoothing)
    e = label_smoothing
    return _pair("cdpo", beta, lambda h: _flipped(beta * h, 1 - e, e))


def robust(beta: float, label_smoothing: float) -> Objective:
    """Robust DPO: unbiased if labels are flipped with probability e = `label_smoothing`.

    [-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1-2e), arXiv 2403.00409, TRL "robust".
    """
    _check(beta=beta, label_smoothing=label_smoothing)
    e = label_smoothing
    return _pair("robust", beta, lambda h: _flipped(beta * h, 1 - e, -e) / (1 - 2 * e))


def ipo(beta: float, length_normalized: bool = True) -> Objective:
    """IPO: (h - 1/(2 beta))^2, h the log-ratio margin. arXiv 2310.12036 eq. 17, with tau = beta.

    If `length_normalized`, h is computed from log-ratios per token, as in TRL 1.16; otherwise from
    their sums, as in TRL 0.8.6. The two forms need different betas.
    """
    _check(beta=beta)
    if not isinstance(length_normalized, bool):
        raise ObjectiveError(f"length_normalized is {length_normalized!r}; expected true or false")
    score = Logps.log_ratio_per_token if length_normalized else Logps.log_ratio
    return _pair("ipo", beta, lambda h: (h - 1 / (2 * beta)) ** 2, score)


def hinge(beta: float) -> Objective:
    """Hinge loss: max(0, 1 - beta h), h the log-ratio margin. SLiC-HF, 2305.10425; TRL "hinge"."""
    _check(beta=beta)
    return _pair("hinge", beta, lambda h: relu(1 - beta * h))


def simpo(beta: float, gamma: float) -> Objective:
    """SimPO: -log sigmoid(beta (log pi(y_w)/|y_w| - log pi(y_l)/|y_l|) - gamma).

    It has no reference. arXiv 2405.14734; TRL's CPO "simpo". `gamma` is the margin, in units of
    reward, by which the chosen response should win; beta does not multiply it (TRL's default: 0.5).
    SimPO's own recipes and oat give the ratio gamma/beta instead (oat: 0.5): gamma = ratio * beta.
    """
    _check(beta=beta, gamma=gamma)
    mean = Logps.policy_per_token
    unit = "log-probability per token"
    return _pair(
        "simpo", beta, lambda h: -log_sigmoid(beta * h - gamma), mean, mean, unit,
        reference_free=True,
    )  # fmt: skip


def sft() -> Objective:
    """Cross entropy of the chosen response, averaged over all tokens of the update. TRL's "sft".

    An example's loss is -log pi(y_w) / (mean length over the update). Its mean over the update's
    examples is therefore the sum over tokens / the number of tokens.
    """

    def function(logps: Logps) -> tuple[PerExample, Metrics]:
        losses = -logps.policy[CHOSEN] / logps.mean_lengths[CHOSEN]
        return losses, {"loss/sft": losses} | _logps(logps, CHOSEN)

    return Objective((CHOSEN,), function, ("sft",), reference_free=True)


def optimism(weight: float, beta: float = 1.0) -> Objective:
    """SELM's exploration term: weight * r(explore), where r is a log-ratio.

    The paper (arXiv 2405.19332 equation 4.2) drops the constant -weight * log pi_ref(y_ref). The
    authors' code keeps it, and so does this function: the gradient is the same, and the term is 0
    while the policy equals the reference. `beta` only scales the metric `optimism/reward`.
    """
    _check(weight=weight, beta=beta)
    return _explore("optimism", beta, lambda logps: weight * logps.log_ratio(EXPLORE))


def weighted_optimism(beta: float, alpha: float, convention: str = "alpha_beta") -> Objective:
    """`optimism` with a weight computed from alpha in one of the SELM paper's two conventions.

    "alpha_beta": the weight is alpha * beta, as in equations 4.2 and 4.3 and in the authors' code
    (their published alphas are in this convention);
    "alpha": the weight is alpha, as in Algorithms 1 and 2, the regret proof, and XPO.
    """
    _check(beta=beta, alpha=alpha)
    if convention not in CONVENTIONS:
        raise ObjectiveError(f"convention is {convention!r}; expected {' or '.join(CONVENTIONS)}")
    return optimism(alpha * beta if convention == "alpha_beta" else alpha, beta)


def selm(beta: float, alpha: float, convention: str = "alpha_beta") -> Objective:
    """SELM: dpo + optimism. arXiv 2405.19332; `weighted_optimism` explains `convention`.

    Where the policy is the reference, the loss is log 2, whatever alpha is:

    >>> same = {role: jnp.array([-10.0]) for role in ROLES}
    >>> one = {role: jnp.ones(1) for role in ROLES}
    >>> losses, metrics = selm(beta=0.1, alpha=0.01)(Logps(same, same, one, one))
    >>> round(float(losses[0]), 4), float(metrics["optimism/reward"][0])
    (0.6931, 0.0)
    """
    return compose(dpo(beta), weighted_optimism(beta, alpha, convention))


def xpo(beta: float, alpha: float) -> Objective:
    """XPO: dpo + alpha * log pi(y_ref). arXiv 2405.21046; like TRL, without -log pi_ref(y_ref)."""
    _check(alpha=alpha)
    term = _explore("xpo", beta, lambda logps: alpha * logps.policy[EXPLORE])
    return compose(dpo(beta), term)


def bradley_terry(
    margin: float = 0.0, label_smoothing: float = 0.0, centering: float = 0.0
) -> Objective:
    """A reward model's Bradley-Terry loss of a pair, with label smoothing and centering.

        loss = -(1-e) log sigmoid(d) - e log sigmoid(-d) + centering * (r(y_w) + r(y_l))^2
        d    = r(y_w) - r(y_l) - margin * (score(y_w) - score(y_l)),   with e = label_smoothing

    r is the model's reward; arXiv 2203.02155 equation 1. With `margin`, rewards should differ by at
    least margin times the difference of the data's scores (arXiv 2307.09288 equation 2, where the
    data contains the difference itself; TRL's column `margin`). `centering` pulls the mean reward
    towards 0; the first two terms do not determine it (arXiv 2312.09244 equation 2; TRL's
    `center_rewards_coefficient`, 0.01 there).
    """
    _check(margin=margin, label_smoothing=label_smoothing, centering=centering)
    e = label_smoothing

    def function(rewards: Rewards) -> tuple[PerExample, Metrics]:
        chosen, rejected = (rewards.model[role] for role in PAIR)
        asked = margin * (rewards.scores[CHOSEN] - rewards.scores[REJECTED])
        losses = _flipped(chosen - rejected - jax.lax.stop_gradient(asked), 1 - e, e)
        losses += centering * jnp.square(chosen + rejected)
        # Equal rewards count as half right: a newly initialised head gives only equal rewards.
        right = (1 + jnp.sign(chosen - rejected)) / 2
        return losses, {"loss/bradley_terry": losses} | _rewards(chosen, rejected, right)

    return Objective(
        PAIR, function, ("bradley_terry",), "reward",
        reference_free=True, rates=True,
    )  # fmt: skip


def compose(*objectives: Objective) -> Objective:
    """The sum of several objectives: losses are added, metrics merged, roles united.

    Raises ObjectiveError if a loss term occurs twice, if the objectives define `rewards/...`
    differently, or if some read log-probabilities and others the rewards of a reward model. Calling
    the sum raises ObjectiveError if two objectives report the same metric (except `logps/...`).
    """
    terms = tuple(term for objective in objectives for term in objective.terms)
    rewards = list(dict.fromkeys(o.reward for o in objectives if o.reward is not None))
    if len(set(terms)) < len(terms):
        raise ObjectiveError(f"{'+'.join(terms)} has a loss term twice; name each term only once")
    if len({objective.rates for objective in objectives}) > 1:
        raise ObjectiveError(
            f"{'+'.join(terms)} cannot be summed: some terms train a language model (from "
            "log-probabilities), others a reward model (from rewards); name terms of one kind"
        )
    if len(rewards) > 1:
        raise ObjectiveError(
            f"{'+'.join(terms)} cannot be summed: the metrics rewards/... would mean both "
            f"{' and '.join(rewards)}; give the terms the same beta, or sum other losses"
        )

    def function(logps: Logps) -> tuple[PerExample, Metrics]:
        total, metrics, owned = jnp.zeros(()), {}, set()
        for objective in objectives:
            losses, found = objective(logps)
            own = {name for name in found if not _is_shared(objective, name)}
            if clash := (own & metrics.keys()) | (owned & found.keys()):
                raise ObjectiveError(
                    f"two terms of a sum both report {', '.join(sorted(clash))}; rename them in "
                    "one of the terms"
                )
            total, metrics, owned = total + losses, metrics | found, owned | own
        return total, metrics

    roles = tuple(role for role in ROLES if any(role in o.roles for o in objectives))
    free = all(objective.reference_free for objective in objectives)
    rates = all(objective.rates for objective in objectives)
    return Objective(roles, function, terms, rewards[0] if rewards else None, free, rates)


def _is_shared(objective: Objective, name: str) -> bool:
    """Whether all objectives of a sum that report the metric `name` report the same value."""
    said = objective.reward is not None  # `compose` has checked that the objectives agree on it
    return name.startswith("logps/") or (said and name.startswith("rewards/"))


def _pair(
    term: str,
    beta: float,
    loss: Callable[[PerExample], PerExample],
    score: Score = Logps.log_ratio,
    reward: Score = Logps.log_ratio,
    unit: str = "log-ratio",
    reference_free: bool = False,
) -> Objective:
    """An objective with loss(score(chosen) - score(rejected)) and rewards beta * reward(role)."""

    def function(logps: Logps) -> tuple[PerExample, Metrics]:
        losses = loss(score(logps, CHOSEN) - score(logps, REJECTED))
        chosen, rejected = (beta * reward(logps, role) for role in PAIR)
        right = (chosen > rejected).astype(losses.dtype)
        metrics = _rewards(chosen, rejected, right) | _logps(logps, *PAIR)
        return losses, {f"loss/{term}": losses} | metrics

    reward_is = f"{beta:g} * {unit}"
    return Objective(PAIR, function, (term,), reward_is, reference_free)


def _rewards(chosen: PerExample, rejected: PerExample, right: PerExample) -> Metrics:
    """The metrics `rewards/...`; `right` is 1 where the chosen response has the higher reward."""
    return {
        f"rewards/{CHOSEN}": chosen,
        f"rewards/{REJECTED}": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": right,
    }


def _logps(logps: Logps, *roles: str) -> Metrics:
    return {f"logps/{role}": logps.policy[role] for role in roles}


def _flipped(reward_margin: PerExample, right: float, wrong: float) -> PerExample:
    return -right * log_sigmoid(reward_margin) - wrong * log_sigmoid(-reward_margin)


def _explore(term: str, beta: float, loss: Callable[[Logps], PerExample]) -> Objective:
    def function(logps: Logps) -> tuple[PerExample, Metrics]:
        losses = loss(logps)
        metrics = {"optimism/reward": beta * logps.log_ratio(EXPLORE)} | _logps(logps, EXPLORE)
        return losses, {f"loss/{term}": losses} | metrics

    return Objective((EXPLORE,), function, (term,))


RANGES = {
    "beta": Range(0, above=True),
    "alpha": Range(0),
    "gamma": Range(0),
    "margin": Range(0),
    "centering": Range(0),
    "label_smoothing": Range(0, 0.5, below=True),
    "weight": Range(),
}


def _check(**settings: float) -> None:
    for key, value in settings.items():
        if (expected := RANGES[key].problem(value)) is not None:
            raise ObjectiveError(f"{key} is {value!r}; expected {expected}")
