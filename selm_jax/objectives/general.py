"""Losses of general preferences, which need no reward model: self-play against a policy's answers.

P(a > b) is the probability that answer a is preferred to b. It is computed from the ranker's scores
as sigmoid((score(a) - score(b)) / temperature), PairRM's own model; a score is in the ranker's
unit. r and h are the log-ratio and its margin (`objective`). beta = 1/eta of the papers, except for
`inpo`, whose paper calls it eta.

What tells Nash-MD, EGPO and online mirror descent apart is who the opponent is, which a loss does
not see: `nash` is the loss of all three, and the opponent is the response `explore`. `inpo` reads
no scores, but two references.
"""

import dataclasses
from collections.abc import Callable

from selm_jax.objectives.objective import (
    Logps,
    Metrics,
    Objective,
    PerExample,
    check,
    logp_metrics,
    margin_loss,
    pair_loss,
    reward_metrics,
)
from selm_jax.objectives.roles import CHOSEN, EXPLORE, PAIR, REJECTED, ROLES


def sppo_hard(beta: float) -> Objective:
    """SPPO with certain wins: (r(y_w) - 1/(2 beta))^2 + (r(y_l) + 1/(2 beta))^2. TRL "sppo_hard".

    Twice `sppo` with P = 1. arXiv 2405.00675 uses beta = 1e-3.
    """
    check(beta=beta)
    target = 1 / (2 * beta)
    return pair_loss("sppo_hard", beta, lambda w, l: (w - target) ** 2 + (l + target) ** 2)


def sppo(beta: float, temperature: float = 1.0) -> Objective:
    """SPPO: [(r(y_w) - (P - 1/2)/beta)^2 + (r(y_l) + (P - 1/2)/beta)^2] / 2, P = P(y_w > y_l).

    arXiv 2405.00675 eq. 4.7, with P of the pair: the authors' code calls it "sppo_single". Their
    "sppo" averages P over all samples of a prompt.
    """
    check(beta=beta, temperature=temperature)

    def loss(logps: Logps) -> PerExample:
        target = (logps.preference(CHOSEN, REJECTED, temperature) - 0.5) / beta
        chosen, rejected = (logps.log_ratio(role) for role in PAIR)
        return ((chosen - target) ** 2 + (rejected + target) ** 2) / 2

    return _general("sppo", beta, PAIR, loss)


def ipo_online(beta: float, temperature: float = 1.0) -> Objective:
    """Online IPO: (h - (P(y_w > y_l) - 1/2) / beta)^2, both answers from the policy.

    arXiv 2403.08635 (IPO-MD); the form of EGPO's code ("Online IPO 2"), which has sums of
    log-ratios. With P = 1 it is `ipo` with length_normalized: false.
    """
    check(beta=beta, temperature=temperature)

    def loss(logps: Logps) -> PerExample:
        h = logps.log_ratio(CHOSEN) - logps.log_ratio(REJECTED)
        return (h - (logps.preference(CHOSEN, REJECTED, temperature) - 0.5) / beta) ** 2

    return _general("ipo_online", beta, PAIR, loss)


def inpo(beta: float, start_share: float = 1 / 3) -> Objective:
    """INPO: (h - 1/(2 beta))^2, h the margin over a mixture of two references. arXiv 2407.00617.

    h = log pi(y_w)/pi(y_l) - s log pi_start(y_w)/pi_start(y_l) - (1 - s) log pi_t(y_w)/pi_t(y_l),
    where pi_t is the policy before the iteration, s = tau/eta is `start_share`, and beta = eta.
    Both references enter as one sum for each response, which a run stores as the reference's
    log-probability. In the first iteration both are the start model, and the loss is `ipo` with
    length_normalized: false.
    """
    check(beta=beta, start_share=start_share)
    loss = margin_loss("inpo", beta, lambda h: (h - 1 / (2 * beta)) ** 2)
    return dataclasses.replace(loss, start_share=float(start_share))


def nash(beta: float, temperature: float = 1.0) -> Objective:
    """Mirror descent to a Nash policy: (h - (P(y_w > y_e) - P(y_l > y_e)) / beta)^2.

    y_e, the response `explore`, is the opponent: of the policy for online mirror descent, of its
    geometric mixture with the reference for Nash-MD (arXiv 2312.00886), of the extrapolated policy
    for EGPO (2503.08942), which samples within each update and is refused (`build.REFUSED`). The
    form of EGPO's code.
    """
    check(beta=beta, temperature=temperature)

    def loss(logps: Logps) -> PerExample:
        h = logps.log_ratio(CHOSEN) - logps.log_ratio(REJECTED)
        wins = [logps.preference(role, EXPLORE, temperature) for role in PAIR]
        return (h - (wins[0] - wins[1]) / beta) ** 2

    return _general("nash", beta, ROLES, loss)


def _general(
    term: str, beta: float, roles: tuple[str, ...], loss: Callable[[Logps], PerExample]
) -> Objective:
    def function(logps: Logps) -> tuple[PerExample, Metrics]:
        losses = loss(logps)
        chosen, rejected = (beta * logps.log_ratio(role) for role in PAIR)
        right = (chosen > rejected).astype(losses.dtype)
        metrics = reward_metrics(chosen, rejected, right) | logp_metrics(logps, *roles)
        return losses, {f"loss/{term}": losses} | metrics

    made = Objective(roles, function, (term,), f"{beta:g} * log-ratio")
    return dataclasses.replace(made, uses_scores=True)
