"""Losses of a preference pair, other than DPO, and the loss of one response (SFT).

Log-ratios r, the margin h and beta are those of `objective`. In the formulas, e is
label_smoothing: the probability that a label is wrong. Losses of the margin alone can be computed
for another divergence than the reverse KL (`divergences`); the others cannot.
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid, relu, sigmoid

from selm_jax.objectives.divergences import divergence_score
from selm_jax.objectives.objective import (
    Logps,
    Metrics,
    Objective,
    ObjectiveError,
    PerExample,
    Score,
    check,
    flipped,
    logp_metrics,
    margin_loss,
    pair_loss,
    per_token,
)
from selm_jax.objectives.roles import CHOSEN, PAIR, REJECTED
from selm_jax.objectives.selm import dpo


def cdpo(
    beta: float, label_smoothing: float, f_divergence: str = "reverse_kl", f_alpha: float = 0.5
) -> Objective:
    """Conservative DPO: label smoothing e (Mitchell, "A note on DPO with noisy preferences", 2023).

    -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h); TRL's smoothed "sigmoid" up to 0.28.
    """
    check(beta=beta, label_smoothing=label_smoothing)
    e = label_smoothing
    score = divergence_score(f_divergence, f_alpha)
    return margin_loss("cdpo", beta, lambda h: flipped(beta * h, 1 - e, e), score)


def wpo(beta: float, f_divergence: str = "reverse_kl", f_alpha: float = 0.5) -> Objective:
    """WPO: dpo times w(y_w) w(y_l), larger for pairs that the policy would write itself.

    w(y) = exp(mean over tokens of log pi(token) - log sum_v pi(v)^2), without gradient: 1 for what
    the policy typically samples. arXiv 2406.11827 with "sampled alignment", in the form of TRL 1.16
    (`use_weighting`); TRL up to 0.28 capped the product at 1.
    """
    inner = dpo(beta, f_divergence, f_alpha)

    def weight(logps: Logps, role: str) -> PerExample:
        excess = logps.policy[role] - logps.collision[role]
        return jnp.exp(excess / jnp.maximum(logps.lengths[role], 1))

    def function(logps: Logps) -> tuple[PerExample, Metrics]:
        losses, metrics = inner(logps)
        both = jax.lax.stop_gradient(weight(logps, CHOSEN) * weight(logps, REJECTED))
        own = {"loss/wpo": both * losses, "wpo/weight": both}
        return both * losses, {k: v for k, v in metrics.items() if k != "loss/dpo"} | own

    return dataclasses.replace(inner, function=function, terms=("wpo",), uses_collision=True)


def ld_dpo(
    beta: float, ld_alpha: float, f_divergence: str = "reverse_kl", f_alpha: float = 0.5
) -> Objective:
    """LD-DPO: dpo, in which tokens beyond the length of the pair's shorter answer count ld_alpha.

    log p(y) = sum over shared tokens + ld_alpha * sum over the tail, for policy and reference.
    arXiv 2409.06411 eq. 10; TRL's `ld_alpha` with "sigmoid". With 1 it is dpo. The metrics
    `rewards/...` are of these log-probabilities, and `logps/...` of whole answers.
    """
    check(beta=beta, ld_alpha=ld_alpha)

    def of(whole: dict[str, PerExample], shared: dict[str, PerExample]) -> dict[str, PerExample]:
        return {role: ld_alpha * whole[role] + (1 - ld_alpha) * shared[role] for role in PAIR}

    def weighed(score: Score) -> Score:
        return lambda logps, role: score(
            logps.replace(
                policy=of(logps.policy, logps.shared_policy),
                reference=of(logps.reference, logps.shared_reference),
            ),
            role,
        )

    loss = margin_loss(
        "ld_dpo", beta, lambda h: -log_sigmoid(beta * h),
        weighed(divergence_score(f_divergence, f_alpha)), weighed(Logps.log_ratio),
        f"log-ratio with tails times {ld_alpha:g}",
    )  # fmt: skip
    return dataclasses.replace(loss, uses_shared=True)


def robust(
    beta: float, label_smoothing: float, f_divergence: str = "reverse_kl", f_alpha: float = 0.5
) -> Objective:
    """Robust DPO: unbiased if labels are flipped with probability e = `label_smoothing`.

    [-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1-2e), arXiv 2403.00409, TRL "robust".
    """
    check(beta=beta, label_smoothing=label_smoothing)
    e = label_smoothing
    score = divergence_score(f_divergence, f_alpha)
    return margin_loss("robust", beta, lambda h: flipped(beta * h, 1 - e, -e) / (1 - 2 * e), score)


def ipo(
    beta: float,
    length_normalized: bool = True,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Objective:
    """IPO: (h - 1/(2 beta))^2, h the log-ratio margin. arXiv 2310.12036 eq. 17, with tau = beta.

    If `length_normalized`, h is computed from log-ratios per token, as in TRL 1.16; otherwise from
    their sums, as in TRL 0.8.6. The two forms need different betas.
    """
    check(beta=beta, length_normalized=length_normalized)
    score = divergence_score(f_divergence, f_alpha)
    score = per_token(score) if length_normalized else score
    return margin_loss("ipo", beta, lambda h: (h - 1 / (2 * beta)) ** 2, score)


def hinge(beta: float, f_divergence: str = "reverse_kl", f_alpha: float = 0.5) -> Objective:
    """Hinge loss: max(0, 1 - beta h), h the log-ratio margin. SLiC-HF, 2305.10425; TRL "hinge"."""
    check(beta=beta)
    score = divergence_score(f_divergence, f_alpha)
    return margin_loss("hinge", beta, lambda h: relu(1 - beta * h), score)


def sigmoid_norm(beta: float, f_divergence: str = "reverse_kl", f_alpha: float = 0.5) -> Objective:
    """DPO of log-ratios per token: -log sigmoid(beta (r_w/|y_w| - r_l/|y_l|)). TRL's name for it.

    Length-normalized DPO of Tulu 3, arXiv 2411.15124 section 5.1. It needs a larger beta (5 there).
    """
    check(beta=beta)
    score = per_token(divergence_score(f_divergence, f_alpha))
    return margin_loss("sigmoid_norm", beta, lambda h: -log_sigmoid(beta * h), score)


def exo_pair(
    beta: float,
    label_smoothing: float = 1e-3,
    f_divergence: str = "reverse_kl",
    f_alpha: float = 0.5,
) -> Objective:
    """EXO: KL(p || q) between the policy's preference p and the label's q. 2402.00856 eq. 16.

    p = sigmoid(beta h) that the chosen response wins, and q = 1 - e; e must be above 0. TRL
    "exo_pair".
    """
    check(beta=beta, label_smoothing=label_smoothing)
    e = label_smoothing
    if e == 0:
        raise ObjectiveError(
            "label_smoothing is 0; expected a number above 0 and below 0.5: exo_pair divides by "
            "it. Its paper recommends 1e-3"
        )

    def loss(h: PerExample) -> PerExample:
        win, lose = (sigmoid(x) * (log_sigmoid(x) - q) for x, q in (
            (beta * h, math.log1p(-e)), (-beta * h, math.log(e)),
        ))  # fmt: skip
        return win + lose

    return margin_loss("exo_pair", beta, loss, divergence_score(f_divergence, f_alpha))


def discopop(
    beta: float, tau: float = 0.05, f_divergence: str = "reverse_kl", f_alpha: float = 0.5
) -> Objective:
    """DiscoPOP: (1-m) (-log sigmoid(x)) + m exp(-x), x = beta h, m = sigmoid(x / tau).

    arXiv 2406.08414 eq. 5 (the log-ratio modulated loss); TRL "discopop", its `discopop_tau`.
    """
    check(beta=beta, tau=tau)

    def loss(h: PerExample) -> PerExample:
        x = beta * h
        # exp(-x) alone would overflow where m is 0.
        return -sigmoid(-x / tau) * log_sigmoid(x) + jnp.exp(log_sigmoid(x / tau) - x)

    return margin_loss("discopop", beta, loss, divergence_score(f_divergence, f_alpha))


# Losses of the two implicit rewards beta r(chosen) and beta r(rejected), not only of their margin.


def nca_pair(beta: float) -> Objective:
    """NCA: -log s(w) - [log s(-w) + log s(-l)]/2, s = sigmoid, w, l = beta r. arXiv 2402.05369.

    It holds up the likelihood of the chosen response, where DPO lets both fall. TRL "nca_pair".
    """
    return _of_rewards(
        "nca_pair", beta,
        lambda w, l: -log_sigmoid(w) - (log_sigmoid(-w) + log_sigmoid(-l)) / 2,
    )  # fmt: skip


def bco_pair(beta: float) -> Objective:
    """BCO of a pair: -log s(w) - log s(-l), s = sigmoid, w, l = beta r. arXiv 2404.04656.

    Without the paper's running mean of rewards, like TRL 1.16's "bco_pair".
    """
    return _of_rewards("bco_pair", beta, lambda w, l: -log_sigmoid(w) - log_sigmoid(-l))


def apo_zero(beta: float) -> Objective:
    """APO-zero: 1 - s(w) + s(l), s = sigmoid, w, l = beta r. arXiv 2408.06266 eq. 7; TRL.

    It raises the chosen response: for answers that are better than the policy's own.
    """
    return _of_rewards("apo_zero", beta, lambda w, l: sigmoid(-w) + sigmoid(l))


def apo_down(beta: float) -> Objective:
    """APO-down: s(w) + 1 - s(w - l), s = sigmoid, w, l = beta r. arXiv 2408.06266 eq. 8; TRL.

    It lowers both responses, the rejected one more: for answers worse than the policy's own.
    """
    return _of_rewards("apo_down", beta, lambda w, l: sigmoid(w) + sigmoid(l - w))


def _of_rewards(
    term: str, beta: float, loss: Callable[[PerExample, PerExample], PerExample]
) -> Objective:
    check(beta=beta)
    return pair_loss(term, beta, lambda chosen, rejected: loss(beta * chosen, beta * rejected))


def simpo(beta: float, gamma: float) -> Objective:
    """SimPO: -log sigmoid(beta (log pi(y_w)/|y_w| - log pi(y_l)/|y_l|) - gamma).

    It has no reference. arXiv 2405.14734; TRL's CPO "simpo". `gamma` is the margin, in units of
    reward, by which the chosen response should win; beta does not multiply it (TRL's default: 0.5).
    SimPO's own recipes and oat give the ratio gamma/beta instead (oat: 0.5): gamma = ratio * beta.
    """
    check(beta=beta, gamma=gamma)
    mean = Logps.policy_per_token
    unit = "log-probability per token"
    return margin_loss(
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
        return losses, {"loss/sft": losses} | logp_metrics(logps, CHOSEN)

    return Objective((CHOSEN,), function, ("sft",), reference_free=True)
