"""Defines what an objective is: a loss per example, and the roles that it needs; and their sums.

A response's log-probability is the sum over its tokens, in nats. A response plays a role: `chosen`
(y_w), `rejected` (y_l), or `explore` (y_ref, sampled from the reference policy). With

    r(role) = log pi(response) - log pi_ref(response)     the log-ratio; beta * r: implicit reward
    h       = r(chosen) - r(rejected)                     the margin

an objective maps `Logps` to one loss per example and named metrics per example; the update averages
both. An objective that trains a reward model maps `Rewards` instead.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, sigmoid
from jaxtyping import Array, Float

from selm_jax.objectives.roles import CHOSEN, EXPLORE, PAIR, REJECTED, ROLES
from selm_jax.shell.ranges import Range

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
    # The ranker's scores, for objectives that set `uses_scores`.
    scores: dict[str, PerExample] = dataclasses.field(default_factory=dict)
    # The count bonus of the explored response; see `exploration.copo`.
    bonus: PerExample | None = None
    # Sums over a response's tokens of log sum_v p(v)^2, for objectives that set `uses_collision`.
    collision: dict[str, PerExample] = dataclasses.field(default_factory=dict)
    # The log-probabilities of only the tokens within the length of the pair's shorter answer, for
    # objectives that set `uses_shared`.
    shared_policy: dict[str, PerExample] = dataclasses.field(default_factory=dict)
    shared_reference: dict[str, PerExample] = dataclasses.field(default_factory=dict)

    def log_ratio(self, role: str) -> PerExample:
        """The log-ratio log pi - log pi_ref, in nats. No gradient flows through the reference."""
        return self.policy[role] - jax.lax.stop_gradient(self.reference[role])

    def policy_per_token(self, role: str) -> PerExample:
        return per_token(lambda logps, of: logps.policy[of])(self, role)

    def preference(self, role: str, over: str, temperature: float) -> PerExample:
        """P(role is preferred to the other), from the scores by the Bradley-Terry model."""
        return sigmoid((self.scores[role] - self.scores[over]) / temperature)

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


def per_token(score: Callable[[Logps, str], PerExample]) -> Callable[[Logps, str], PerExample]:
    """The score divided by the response's length."""

    # An empty response counts as one token, as in TRL: 0/0 would poison the whole update.
    return lambda logps, role: score(logps, role) / jnp.maximum(logps.lengths[role], 1)


LossFunction = Callable[..., tuple[PerExample, Metrics]]
Score = Callable[[Logps, str], PerExample]


@dataclass(frozen=True)
class Objective:
    """A loss and the roles that it needs; call it with `Logps` to get (losses, metrics).

    With `rates`, it is called with `Rewards` instead and trains a reward model. `terms` are its
    names under `loss/`. `reward` describes in words what its `rewards/...` metrics are; None leaves
    it open. `compose` reads both. With `reference_free`, the loss does not use the reference, so
    the reference is not scored; with `uses_scores`, it reads the ranker's scores, with
    `uses_collision` `Logps.collision`, and with `uses_shared` `Logps.shared_policy`. `bonus_bits`,
    if not 0, asks for `Logps.bonus`, from counts by a hash of so many bits (`preferences.novelty`).
    With `start_share`, the reference is a mixture: its log-probabilities are that share of the
    start model's, and the rest of the reference's (`general.inpo`). `beta` scales the implicit
    rewards that are measured for every objective (`measures`). Calling it raises ObjectiveError if
    the batch lacks a role, or if `function` does not return one number per example.
    """

    roles: tuple[str, ...]
    function: LossFunction
    terms: tuple[str, ...] = ()
    reward: str | None = None
    reference_free: bool = False
    rates: bool = False
    beta: float = 1.0
    uses_scores: bool = False
    uses_collision: bool = False
    uses_shared: bool = False
    bonus_bits: int = 0
    start_share: float = 0.0

    def __post_init__(self):
        if not self.roles or not set(self.roles) <= set(ROLES):
            raise ObjectiveError(f"{self} has roles {self.roles}; expected one or more of {ROLES}")

    def __call__(self, batch: Logps | Rewards) -> tuple[PerExample, Metrics]:
        given = batch.given
        if absent := [role for role in self.roles if role not in given]:
            has = ", ".join(given)
            raise ObjectiveError(f"{self} needs the roles {', '.join(absent)}; the batch has {has}")
        if self.uses_scores and not batch.scores:
            raise ObjectiveError(f"{self} needs the ranker's scores, and this batch has none")
        if self.uses_collision and not batch.collision:
            raise ObjectiveError(f"{self} needs Logps.collision, and this batch has none")
        if self.uses_shared and not (batch.shared_policy and batch.shared_reference):
            raise ObjectiveError(f"{self} needs Logps.shared_policy, and this batch has none")
        found = self.function(batch)
        if not (isinstance(found, tuple) and len(found) == 2 and isinstance(found[1], Mapping)):
            raise ObjectiveError(
                f"{self} returned a {type(found).__name__}. Return two things: one loss per "
                "example, and a dictionary of metrics, which may be empty"
            )
        losses, metrics = found
        if own := [name for name in metrics if name.startswith("_")]:
            raise ObjectiveError(
                f"{self}: the metric {own[0]} begins with _, as the update's own counts do. Give "
                "it another name"
            )
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

    shares = {o.start_share for o in objectives if not o.reference_free}
    if len(shares) > 1:
        raise ObjectiveError(
            f"{'+'.join(terms)} cannot be summed: inpo compares with a mixture of two references, "
            "the other terms with one. Sum it with losses that need no reference, such as sft"
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
    return Objective(
        roles, function, terms, rewards[0] if rewards else None, free, rates,
        uses_scores=any(objective.uses_scores for objective in objectives),
        uses_collision=any(objective.uses_collision for objective in objectives),
        uses_shared=any(objective.uses_shared for objective in objectives),
        bonus_bits=max(objective.bonus_bits for objective in objectives),
        start_share=max(shares, default=0.0),
    )  # fmt: skip


def _is_shared(objective: Objective, name: str) -> bool:
    """Says whether all objectives of a sum that report the metric `name` report the same value."""
    said = objective.reward is not None  # `compose` has checked that the objectives agree on it
    return name.startswith("logps/") or (said and name.startswith("rewards/"))


def scaled(weight: float, objective: Objective) -> Objective:
    """The objective times a weight: its losses and its metrics `loss/...`, and nothing else."""
    check(weight=weight)

    def function(batch: Any) -> tuple[PerExample, Metrics]:
        losses, metrics = objective(batch)
        own = {name: weight * value for name, value in metrics.items() if name.startswith("loss/")}
        return weight * losses, metrics | own

    return dataclasses.replace(objective, function=function)


def pair_loss(
    term: str,
    beta: float,
    loss: Callable[[PerExample, PerExample], PerExample],
    score: Score = Logps.log_ratio,
    reward: Score = Logps.log_ratio,
    unit: str = "log-ratio",
    reference_free: bool = False,
) -> Objective:
    """An objective with loss(score(chosen), score(rejected)) and rewards beta * reward(role)."""

    def function(logps: Logps) -> tuple[PerExample, Metrics]:
        losses = loss(score(logps, CHOSEN), score(logps, REJECTED))
        chosen, rejected = (beta * reward(logps, role) for role in PAIR)
        right = (chosen > rejected).astype(losses.dtype)
        metrics = reward_metrics(chosen, rejected, right) | logp_metrics(logps, *PAIR)
        return losses, {f"loss/{term}": losses} | metrics

    reward_is = f"{beta:g} * {unit}"
    return Objective(PAIR, function, (term,), reward_is, reference_free)


def margin_loss(
    term: str, beta: float, loss: Callable[[PerExample], PerExample], *how: Any, **more: Any
) -> Objective:
    """A `pair_loss` that depends on the margin score(chosen) - score(rejected) alone."""
    return pair_loss(term, beta, lambda chosen, rejected: loss(chosen - rejected), *how, **more)


def reward_metrics(chosen: PerExample, rejected: PerExample, right: PerExample) -> Metrics:
    """The metrics `rewards/...`; `right` is 1 where the chosen response has the higher reward."""
    return {
        f"rewards/{CHOSEN}": chosen,
        f"rewards/{REJECTED}": rejected,
        "rewards/margins": chosen - rejected,
        "rewards/accuracies": right,
    }


def logp_metrics(logps: Logps, *roles: str) -> Metrics:
    return {f"logps/{role}": logps.policy[role] for role in roles}


def flipped(reward_margin: PerExample, right: float, wrong: float) -> PerExample:
    return -right * log_sigmoid(reward_margin) - wrong * log_sigmoid(-reward_margin)


def explore_loss(term: str, beta: float, loss: Callable[[Logps], PerExample]) -> Objective:
    def function(logps: Logps) -> tuple[PerExample, Metrics]:
        losses = loss(logps)
        metrics = {"optimism/reward": beta * logps.log_ratio(EXPLORE)} | logp_metrics(
            logps, EXPLORE
        )
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
    "f_alpha": Range(0),
    "ld_alpha": Range(0, 1),
    "tau": Range(0, above=True),
    "temperature": Range(0, above=True),
    "bits": Range(1, 64, whole=True),
    "start_share": Range(0, 1),
}
CHOICES = {
    "convention": ("alpha_beta", "alpha"),
    "length_normalized": (True, False),
    "sign": ("optimistic", "pessimistic"),
    "divergence": ("kl", "hellinger", "forward_kl"),
    "atom": ("complement", "inverse", "arctanh"),
    "bonus_of": ("explore", "rejected"),
    "f_divergence": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
}


def check(**settings: object) -> None:
    """Raises ObjectiveError if a setting is outside its range or is none of its choices."""
    for key, value in settings.items():
        if key in RANGES:
            problem = RANGES[key].problem(value)
        else:
            known = any(value is each or value == each != 1 for each in CHOICES[key])
            names = (str(c).lower() if isinstance(c, bool) else c for c in CHOICES[key])
            problem = None if known else " or ".join(names)
        if problem is not None:
            raise ObjectiveError(f"{key} is {value!r}; expected {problem}")
