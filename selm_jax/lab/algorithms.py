"""Describes algorithms as rounds of sampling, feedback and fitting on a `World`.

    theta = 0                                                  the policy is the reference
    for each round:
        candidates ~ the algorithm's slots (policy, reference, ...), prompts ~ the world
        chosen, rejected = best and worst candidate according to noisy feedback
        theta = some descent steps on  mean over the data of fit(logps) + weight * bonus(logps)

`fit` and `bonus` are objectives of `objectives.losses`, the same functions that train language
models: they see only `Logps`, and nothing else from the world. An objective's settings are plain
numbers; the values that differ between runs of one program (alpha, noise, coverage) are arrays in
`Settings`.

`rounds.run` runs an algorithm.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.struct

from selm_jax.objectives.losses import CONVENTIONS, Objective, dpo, optimism, xpo

SOURCES = ("policy", "reference", "start", "uniform")
SCHEDULES = ("constant", "inverse_sqrt", "theory")


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where a round's candidate response comes from: a policy and a sampling temperature.

    Temperature 0 gives the most probable response.

    policy: the current policy; reference: the current reference, which may move; start: the first
    reference; uniform: all responses with equal probability.
    """

    source: str
    temperature: float = 1.0

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"source is {self.source!r}; expected one of {SOURCES}")


POLICY, REFERENCE, START, UNIFORM = map(Slot, SOURCES)


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """The rules of an algorithm for each round: sampling, feedback and fitting; static under jit.

    Attributes:
      name: of the algorithm, for records and errors.
      slots: the candidates of a prompt; the best becomes chosen, the worst rejected.
      fit: the objective. None is the oracle, which knows the optimum and fits it.
      bonus: a second objective, whose loss is multiplied by the round's weight.
      convention: whether the weight is alpha * beta or alpha, as in `losses.weighted_optimism`;
        beta is that of the losses: beta / temperature.
      schedule: of alpha: constant; inverse_sqrt, alpha / sqrt(round); theory, the theorem's.
      explore: the slot of y_ref. None: the bonus is its exact expectation over the reference.
      exact_data: whether to use every pair with its probability instead of samples (two slots
        only).
      moving: whether the policy becomes the reference after each round (for losses and slots, not
        for J).
      kept: whether the pairs of all rounds are used; otherwise only those of the current round.
      split: whether the policy that samples (`policy` in slots) and the policy that is evaluated
        are fitted separately, each with its own share of the bonus (`Settings.asker`,
        `Settings.judged`). This separates the effect of better data from that of a different fit to
        the same data.
      optimizer: momentum, which converges to the minimum; adam, as for language models.
    """

    name: str
    slots: tuple[Slot, ...] = (POLICY, REFERENCE)
    fit: Objective | None = None
    bonus: Objective | None = None
    convention: str = "alpha_beta"
    schedule: str = "constant"
    explore: int | None = None
    exact_data: bool = False
    moving: bool = False
    kept: bool = True
    split: bool = False
    optimizer: str = "momentum"

    def __post_init__(self):
        for what, found, known in (
            ("convention", self.convention, CONVENTIONS),
            ("schedule", self.schedule, SCHEDULES),
            ("optimizer", self.optimizer, ("momentum", "adam")),
        ):
            if found not in known:
                raise ValueError(f"{self.name}: {what} is {found!r}; expected one of {known}")
        if self.exact_data and (
            len(self.slots) != 2 or any(s.temperature != 1 for s in self.slots)
        ):
            raise ValueError(
                f"{self.name}: `exact_data` requires exactly two slots at temperature 1"
            )
        if self.moving and self.split:
            raise ValueError(
                f"{self.name}: `moving` and `split` cannot be combined, because it is unclear "
                "which of the two policies becomes the reference"
            )
        if self.explore is None:
            for o in (self.fit, self.bonus):
                if o is not None and "explore" in o.roles and o.roles != ("explore",):
                    raise ValueError(
                        f"{self.name}: {o} reads y_ref and other responses, so its expectation "
                        "cannot be computed exactly; choose the slot of y_ref with explore=0 or 1"
                    )


def replace(algorithm: Algorithm, **changes: Any) -> Algorithm:
    return dataclasses.replace(algorithm, **changes)


def zoo(beta: float, alpha: float = 0.0) -> dict[str, Algorithm]:
    """Defines the algorithms from the literature, such as SELM, DPO and XPO, by name.

    `alpha` is used only for XPO, whose loss contains it; the others use `Settings.alpha`.
    """
    fit, term = dpo(beta), optimism(1.0, beta)
    selm = Algorithm("selm", fit=fit, bonus=term)
    data = (START, START)  # the dataset's own two responses
    made = [
        # SELM's Algorithm 2 as written, in both readings of its last line.
        replace(selm, name="selm_fixed", convention="alpha"),
        replace(selm, name="selm_moving", convention="alpha", moving=True),
        # SELM's Algorithm 1: best and worst of y_ref and the data's pair, only the newest data.
        replace(
            selm, name="selm_practice", slots=(REFERENCE, *data), explore=0, moving=True, kept=False
        ),
        # The authors' code: y_ref is greedy, and the optimiser is Adam.
        replace(
            selm, name="selm_code", slots=(Slot("reference", 0), *data), explore=0, moving=True,
            kept=False, optimizer="adam",
        ),
        Algorithm("xpo", fit=xpo(beta, alpha), explore=1),
        Algorithm("dpo_online", fit=fit),
        Algorithm("dpo_on_policy", slots=(POLICY, POLICY), fit=fit),
        Algorithm("dpo_passive", slots=(REFERENCE, REFERENCE), fit=fit),
        Algorithm("greedy", slots=(Slot("policy", 0), REFERENCE), fit=fit),
        Algorithm("best_of_4", slots=(POLICY,) * 4, fit=fit),
        Algorithm("uniform", slots=(UNIFORM, UNIFORM), fit=fit),
        Algorithm("oracle"),
    ]  # fmt: skip
    # Iterative DPO, SELM's baseline: the same without the term. (For selm_fixed it is dpo_online.)
    made += [
        replace(a, name=a.name.replace("selm", "dpo"), bonus=None)
        for a in made
        if a.bonus is not None and a.moving
    ]
    return {a.name: a for a in made}


@flax.struct.dataclass
class Settings:
    """Numbers, such as alpha, that may differ between the runs of one compiled program.

    Attributes:
      alpha: weight of the bonus.
      temperature: of the Bradley-Terry feedback, in units of reward (0: the best always wins).
      assumed: the temperature that the learner assumes, above 0.
      flips: probability that a label is flipped afterwards.
      bound: the policy class is |theta| <= bound * |theta_star|.
      rate: the size of a descent step, in units of 1 / (beta / assumed)^2 (momentum) or of theta
        (adam).
      asker, judged: factors of the bonus's weight in the two fits of a `split` algorithm.
    """

    alpha: Any = 0.0
    temperature: Any = 0.1
    assumed: Any = 0.1
    flips: Any = 0.0
    bound: Any = 2.0
    rate: Any = 0.5
    asker: Any = 1.0
    judged: Any = 1.0


class Length(NamedTuple):
    """The length of a run: rounds, compared pairs per round, and descent steps per round."""

    rounds: int = 32
    queries: int = 4
    steps: int = 16  # descent steps of a round
