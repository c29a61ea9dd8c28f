"""Losses of a preference pair, other than DPO, and the loss of one response (SFT).

Log-ratios r, the margin h and beta are those of `objective`. In the formulas, e is
label_smoothing: the probability that a label is wrong.
"""

from jax.nn import log_sigmoid, relu

from selm_jax.objectives.objective import (
    Logps,
    Metrics,
    Objective,
    ObjectiveError,
    PerExample,
    check,
    flipped,
    logp_metrics,
    margin_loss,
)
from selm_jax.objectives.roles import CHOSEN


def cdpo(beta: float, label_smoothing: float) -> Objective:
    """Conservative DPO: label smoothing e (Mitchell, "A note on DPO with noisy preferences", 2023).

    -(1-e) log sigmoid(beta h) - e log sigmoid(-beta h); TRL's smoothed "sigmoid" up to 0.28.
    """
    check(beta=beta, label_smoothing=label_smoothing)
    e = label_smoothing
    return margin_loss("cdpo", beta, lambda h: flipped(beta * h, 1 - e, e))


def robust(beta: float, label_smoothing: float) -> Objective:
    """Robust DPO: unbiased if labels are flipped with probability e = `label_smoothing`.

    [-(1-e) log sigmoid(beta h) + e log sigmoid(-beta h)] / (1-2e), arXiv 2403.00409, TRL "robust".
    """
    check(beta=beta, label_smoothing=label_smoothing)
    e = label_smoothing
    return margin_loss("robust", beta, lambda h: flipped(beta * h, 1 - e, -e) / (1 - 2 * e))


def ipo(beta: float, length_normalized: bool = True) -> Objective:
    """IPO: (h - 1/(2 beta))^2, h the log-ratio margin. arXiv 2310.12036 eq. 17, with tau = beta.

    If `length_normalized`, h is computed from log-ratios per token, as in TRL 1.16; otherwise from
    their sums, as in TRL 0.8.6. The two forms need different betas.
    """
    check(beta=beta)
    if not isinstance(length_normalized, bool):
        raise ObjectiveError(f"length_normalized is {length_normalized!r}; expected true or false")
    score = Logps.log_ratio_per_token if length_normalized else Logps.log_ratio
    return margin_loss("ipo", beta, lambda h: (h - 1 / (2 * beta)) ** 2, score)


def hinge(beta: float) -> Objective:
    """Hinge loss: max(0, 1 - beta h), h the log-ratio margin. SLiC-HF, 2305.10425; TRL "hinge"."""
    check(beta=beta)
    return margin_loss("hinge", beta, lambda h: relu(1 - beta * h))


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
