"""The methods that `selm lab compare` sets side by side, each as a change of plain online DPO.

An arm changes one thing: who writes the responses (a sampler), or the loss that is fitted. Losses
are those of `objectives.losses`, called with the laboratory's exact log-probabilities. Where a loss
is DPO plus a term, the term is linear in alpha, so it is the loss at alpha = 1 minus that at 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selm_jax.lab import samplers
from selm_jax.objectives.losses import (
    Objective,
    copo,
    dpo,
    geb,
    ipo_online,
    nash,
    scaled,
    se_popo,
    selm,
    sppo,
    vpo,
    xpo,
)

ADDS, REPLACES = "adds", "replaces"
EXPLORERS = ("reference", "uniform", "pair")

SAMPLERS = (
    samplers.policy_reference,
    samplers.policy_policy,
    samplers.reference_reference,
    samplers.uniform,
    samplers.pilaf,
    samplers.dpo_mix,
    samplers.nash,
    samplers.extremes,
)


@dataclass(frozen=True)
class Bend:
    """A loss that is fitted instead of DPO, as a change of it.

    Attributes:
      make: the loss, from beta and alpha.
      kind: adds, a term to DPO, of strength alpha; or replaces, another loss than DPO, which reads
        log-ratios divided by its strength, and so has beta divided by it.
      explorer: who writes y_e of a term: the reference or the uniform policy, in the exact mean; or
        pair, the second response of every pair.
      plain: whether a term reads log-probabilities as they are, because it needs a response's
        probability; others read them in units of the feedback's noise, as DPO does (see `rounds`).
    """

    name: str
    make: Callable[..., Objective]
    kind: str = ADDS
    explorer: str = "reference"
    plain: bool = False


def _even(loss: Callable[[float], Objective], beta: float) -> Objective:
    """A squared loss times beta^2 / 8, so that it is as curved as DPO and needs the same steps."""
    return scaled(beta**2 / 8, loss(beta))


BENDS = (
    Bend("dpo", lambda beta, _: dpo(beta), REPLACES),
    Bend("selm", selm),
    Bend("xpo", xpo, explorer="pair"),
    Bend("vpo", vpo, explorer="uniform"),
    Bend("vpo_pessimistic", lambda b, a: vpo(b, a, "pessimistic"), explorer="uniform"),
    Bend("se_popo", se_popo),
    Bend("copo", copo, plain=True),
    Bend("geb_complement", lambda b, a: geb(b, a, atom="complement"), plain=True),
    Bend("geb_inverse", lambda b, a: geb(b, a, atom="inverse"), plain=True),
    Bend("geb_arctanh", lambda b, a: geb(b, a, atom="arctanh"), plain=True),
    Bend("ipo_online", lambda beta, _: _even(ipo_online, beta), REPLACES),
    Bend("sppo", lambda beta, _: _even(sppo, beta), REPLACES),
    Bend("nash", lambda beta, _: _even(nash, beta), REPLACES),
)


@dataclass(frozen=True)
class Arm:
    """A method: its loss, its sampler, and the strengths from which its best is chosen.

    Attributes:
      what: one line for a reader: what the method changes.
      bend, sampler: names in `BENDS` and `SAMPLERS`.
      strengths: alphas of a term, or the divisors of another loss's beta; one is no choice.
      many: whether four responses are ranked and the best and the worst become the pair.
    """

    name: str
    what: str
    bend: str = "dpo"
    sampler: str = "policy_reference"
    strengths: Sequence[float] = (1.0,)
    many: bool = False

    @property
    def bends(self) -> bool:
        """Says whether its fit differs from DPO's, so that data and fit can be told apart."""
        return self.bend != "dpo" or len(self.strengths) > 1


_ALPHAS = (0.01, 0.05, 0.25, 1.0)
_FURTHER = (2.0, 5.0, 12.0, 30.0)


def _times(factor: float) -> tuple[float, ...]:
    return tuple(float(f"{factor * alpha:.6g}") for alpha in _ALPHAS)


BASELINE = Arm("dpo", "plain online DPO: one response of the policy, one of the reference")
ARMS = (
    Arm("dpo_other_beta", "DPO with another beta: the control of every strength below", "dpo",
        strengths=(0.5, 0.7, 1.4, 2.0)),
    Arm("selm", "DPO + alpha beta r(y_e), y_e of the reference", "selm", strengths=_ALPHAS),
    Arm("selm_opposite", "the same with alpha below 0", "selm", strengths=_times(-1)),
    Arm("xpo", "DPO + alpha log pi(y_e), y_e the pair's second", "xpo", strengths=_times(0.1)),
    Arm("vpo", "as selm, y_e uniform", "vpo", strengths=_ALPHAS),
    Arm("vpo_pessimistic", "the same with the other sign", "vpo_pessimistic", strengths=_ALPHAS),
    Arm("se_popo", "DPO + a bounded term, y_e of the reference", "se_popo", strengths=_times(0.4)),
    Arm("copo", "DPO - a count bonus times log pi(y_e)", "copo", strengths=_times(30)),
    Arm("geb_complement", "DPO + alpha pi(y_e)", "geb_complement", strengths=_times(10)),
    Arm("geb_inverse", "DPO - alpha / pi(y_e)", "geb_inverse", strengths=_times(1e-4)),
    Arm("geb_arctanh", "DPO - alpha arctanh(1 - pi(y_e))", "geb_arctanh", strengths=_times(1)),
    Arm("ipo_online", "a squared loss of the margin", "ipo_online", strengths=_FURTHER),
    Arm("sppo", "a squared loss of each response", "sppo", strengths=(1.0, 2.5, 6.0, 15.0)),
    Arm("nash_md", "the squared loss against the mixture with the reference", "nash", "nash",
        strengths=_FURTHER),
    Arm("policy_policy", "both responses of the policy", sampler="policy_policy"),
    Arm("passive", "both responses of the reference", sampler="reference_reference"),
    Arm("uniform", "both responses at random: the control", sampler="uniform"),
    Arm("pilaf", "policy pairs, mixed with raised and lowered ones", sampler="pilaf"),
    Arm("dpo_mix", "the same around the uniform policy", sampler="dpo_mix"),
    Arm("nash_mixture", "the policy against its mixture with the reference", sampler="nash"),
    Arm("own_best_worst", "best and worst of 4 in the policy's own opinion", sampler="extremes"),
    Arm("best_of_4", "best and worst of 4 ranked responses (each query sees 4)", many=True),
)  # fmt: skip
