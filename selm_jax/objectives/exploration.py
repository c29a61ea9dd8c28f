"""Exploration: what other papers than SELM's add to DPO.

Each is dpo(beta) plus a term. r is the log-ratio of the response `explore`, whose sampler is the
experiment's choice (`feedback.explore`); the papers' own samplers differ, as each function says.
"""

import dataclasses

import jax
import jax.numpy as jnp

from selm_jax.objectives.objective import (
    Logps,
    Metrics,
    Objective,
    ObjectiveError,
    PerExample,
    check,
    compose,
    explore_loss,
    logp_metrics,
)
from selm_jax.objectives.roles import EXPLORE, REJECTED
from selm_jax.objectives.selm import dpo


def xpo(beta: float, alpha: float) -> Objective:
    """XPO: dpo + alpha * log pi(y_ref). arXiv 2405.21046; like TRL, without -log pi_ref(y_ref)."""
    check(alpha=alpha)
    term = explore_loss("xpo", beta, lambda logps: alpha * logps.policy[EXPLORE])
    return compose(dpo(beta), term)


def vpo(beta: float, alpha: float, sign: str = "optimistic") -> Objective:
    """VPO: dpo +- alpha * beta * r(explore), the value as a regulariser. arXiv 2405.19320.

    The sign is + if "optimistic" (the paper's online form) and - if "pessimistic" (offline). The
    paper draws `explore` from a calibration policy pi_cal, for which rewards are 0 in the mean;
    with pi_cal = pi_ref the optimistic form is SELM.
    """
    check(beta=beta, alpha=alpha, sign=sign)
    weight = alpha * beta * (1 if sign == "optimistic" else -1)
    term = explore_loss("vpo", beta, lambda logps: weight * logps.log_ratio(EXPLORE))
    return compose(dpo(beta), term)


def se_popo(beta: float, alpha: float) -> Objective:
    """SE-POPO: dpo + alpha * (sigmoid(beta r) - 1/2) / beta. arXiv 2502.00666, the authors' code.

    The term is a probability to win, not a reward, so it is bounded, and 0 while the policy equals
    the reference. The code lowers alpha by iteration: an experiment's `alpha: [1e-2, 5e-3, 0]`.
    """
    check(alpha=alpha)

    def loss(logps: Logps) -> PerExample:
        # sigmoid(x) - 1/2 is tanh(x / 2) / 2, which loses no digits where x is small.
        return alpha * jnp.tanh(beta * logps.log_ratio(EXPLORE) / 2) / (2 * beta)

    return compose(dpo(beta), explore_loss("se_popo", beta, loss))


def copo(beta: float, alpha: float, bits: int = 16) -> Objective:
    """COPO: dpo - alpha * w * log pi(explore), w = min(exp(r), 5) * bonus / 10. arXiv 2501.12735.

    No gradient flows through w. The bonus is large where answers of the kind are rare. The paper's
    comes from a network that counts over the whole run; here it is 1 / sqrt(n) from counts of an
    iteration's explored answers by a hash of so many `bits` (`preferences.novelty`), or a number of
    the data (`data.bonus`). The sign is the opposite of SELM's: the term raises the response.
    """
    check(alpha=alpha, bits=bits)

    def loss(logps: Logps) -> PerExample:
        if logps.bonus is None:
            raise ObjectiveError(
                "copo needs Logps.bonus, a count bonus for each example. An Objective of your own "
                "that calls copo must ask for it: pass bonus_bits=16"
            )
        weight = jnp.exp(jnp.minimum(logps.log_ratio(EXPLORE), jnp.log(5.0))) * logps.bonus / 10
        return -alpha * jax.lax.stop_gradient(weight) * logps.policy[EXPLORE]

    term = dataclasses.replace(explore_loss("copo", beta, loss), bonus_bits=bits)
    return compose(dpo(beta), term)


def geb(
    beta: float,
    alpha: float,
    divergence: str = "kl",
    atom: str = "complement",
    bonus_of: str = EXPLORE,
    length_normalized: bool = False,
) -> Objective:
    """GEB: f-DPO minus a bonus that is larger the less likely the response. arXiv 2510.03269.

    The bonus is alpha * g(u), with u large where p = pi(response) is small. The authors' code has
    three atoms u for each of three divergences:

        divergence    f-DPO's score   u: complement        inverse              arctanh
        kl            r               p (its loss)         -1/(p + 1e-5)        -A
        hellinger     2 - 2 exp(-r/2) -sqrt(1.5 - p)       -1/(sqrt p + 1e-5)   -sqrt(A + 0.5)
        forward_kl    1 - exp(-r)     -log(1 - p)          log p                -log A

    The table gives the LOSS of each, without alpha, and A = arctanh(1 - p - 1e-5). The paper draws
    the response from pi_ref (`bonus_of: explore`); the code takes the rejected one.

    Like the code, p is the probability of the whole response. Beyond 100 nats p is 0 in float32, so
    for long answers every form but forward_kl's inverse is constant and has no gradient. Before
    that, the inverse forms are steep: their slope per nat is in the thousands near p = 1e-10.
    `length_normalized` makes p the geometric mean of the tokens' probabilities, which is never that
    small.
    """
    check(alpha=alpha, divergence=divergence, atom=atom)
    check(bonus_of=bonus_of, length_normalized=length_normalized)
    how = {
        "kl": {},
        "hellinger": {"f_divergence": "alpha_divergence", "f_alpha": 0.5},
        "forward_kl": {"f_divergence": "forward_kl"},
    }[divergence]
    penalty = _GEB[divergence, atom]

    def function(logps: Logps) -> tuple[PerExample, Metrics]:
        score = Logps.policy_per_token if length_normalized else lambda of, role: of.policy[role]
        losses = alpha * penalty(jnp.minimum(score(logps, bonus_of), 0))
        return losses, {"loss/geb": losses} | logp_metrics(logps, bonus_of)

    role = EXPLORE if bonus_of == EXPLORE else REJECTED
    return compose(dpo(beta, **how), Objective((role,), function, ("geb",), reference_free=True))


def _log_complement(logp: PerExample) -> PerExample:
    """log(1 - p), at most for p = 1 - 1e-6: at p = 1 there is no such number."""
    return jnp.log1p(-jnp.exp(jnp.minimum(logp, -1e-6)))


def _arctanh(logp: PerExample) -> PerExample:
    """arctanh(1 - q) with q = p + 1e-5, computed from q; at most for p = 1 - 1e-3."""
    q = jnp.exp(jnp.minimum(logp, -1e-3)) + 1e-5
    return (jnp.log(2 - q) - jnp.log(q)) / 2


_GEB = {
    ("kl", "complement"): jnp.exp,
    ("kl", "inverse"): lambda logp: -1 / (jnp.exp(logp) + 1e-5),
    ("kl", "arctanh"): lambda logp: -_arctanh(logp),
    ("hellinger", "complement"): lambda logp: -jnp.sqrt(1.5 - jnp.exp(logp)),
    ("hellinger", "inverse"): lambda logp: -1 / (jnp.exp(logp / 2) + 1e-5),
    ("hellinger", "arctanh"): lambda logp: -jnp.sqrt(_arctanh(logp) + 0.5),
    ("forward_kl", "complement"): lambda logp: -_log_complement(logp),
    ("forward_kl", "inverse"): lambda logp: logp,
    ("forward_kl", "arctanh"): lambda logp: -jnp.log(_arctanh(logp)),
}
