"""The losses of one example in float64, written from the papers' formulas and not from our code.

A formula gets the example `x` and its settings. `x.w`, `x.l` and `x.e` are the responses chosen,
rejected and explore; each has log-probabilities `p` and `ref`, a length `n` and a score `s`.
"""

import math
from types import SimpleNamespace

import numpy as np

from selm_jax.objectives.roles import ROLES


def example(logps, i):
    """The i-th example of a batch."""
    parts = {"p": logps.policy, "ref": logps.reference, "n": logps.lengths, "s": logps.scores}
    if logps.collision:
        parts["c"] = logps.collision
    if logps.shared_policy:
        parts |= {"p_shared": logps.shared_policy, "ref_shared": logps.shared_reference}
    made = [
        SimpleNamespace(**{name: float(of[role][i]) for name, of in parts.items()})
        for role in ROLES
    ]
    x = SimpleNamespace(**dict(zip("wle", made, strict=True)))
    x.mean_chosen = float(logps.mean_lengths["chosen"])
    x.bonus = None if logps.bonus is None else float(logps.bonus[i])
    return x


def each(name, logps, **settings):
    """The losses of a batch, one example at a time."""
    of = FORMULAS[name]
    return np.array([of(example(logps, i), **settings) for i in range(len(logps.policy["chosen"]))])


def sigmoid(x):
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def log_sigmoid(x):
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


def ratio(y):
    return y.p - y.ref


def fprime(y, f_divergence="reverse_kl", f_alpha=0.5):
    """f'(pi / pi_ref), for f(t) = t log t, -log t, Jensen-Shannon's and the alpha family."""
    if f_divergence == "reverse_kl":
        return ratio(y)
    t = math.exp(ratio(y))
    if f_divergence == "forward_kl":
        return 1 - 1 / t
    if f_divergence == "js_divergence":
        return math.log(2 * t / (t + 1))
    return (t ** (f_alpha - 1) - 1) / (f_alpha - 1)


def margin(x, **f):
    return fprime(x.w, **f) - fprime(x.l, **f)


def mean_margin(x, **f):
    return fprime(x.w, **f) / max(x.w.n, 1) - fprime(x.l, **f) / max(x.l.n, 1)


def dpo(x, beta, **f):
    return -log_sigmoid(beta * margin(x, **f))


def cdpo(x, beta, label_smoothing, **f):
    h, e = beta * margin(x, **f), label_smoothing
    return -(1 - e) * log_sigmoid(h) - e * log_sigmoid(-h)


def robust(x, beta, label_smoothing, **f):
    h, e = beta * margin(x, **f), label_smoothing
    return (-(1 - e) * log_sigmoid(h) + e * log_sigmoid(-h)) / (1 - 2 * e)


def ipo(x, beta, length_normalized=True, **f):
    h = mean_margin(x, **f) if length_normalized else margin(x, **f)
    return (h - 1 / (2 * beta)) ** 2


def hinge(x, beta, **f):
    return max(0.0, 1 - beta * margin(x, **f))


def sigmoid_norm(x, beta, **f):
    return -log_sigmoid(beta * mean_margin(x, **f))


def exo_pair(x, beta, label_smoothing, **f):
    p, q = sigmoid(beta * margin(x, **f)), 1 - label_smoothing
    entropy = lambda a, b: a * math.log(a / b) if a > 0 else 0.0
    return entropy(p, q) + entropy(sigmoid(-beta * margin(x, **f)), 1 - q)


def discopop(x, beta, tau, **f):
    h = beta * margin(x, **f)
    m = sigmoid(h / tau)
    return (1 - m) * -log_sigmoid(h) + (m * math.exp(-h) if m > 0 else 0.0)


def nca_pair(x, beta):
    w, l = beta * ratio(x.w), beta * ratio(x.l)
    return -log_sigmoid(w) - 0.5 * log_sigmoid(-w) - 0.5 * log_sigmoid(-l)


def bco_pair(x, beta):
    return -log_sigmoid(beta * ratio(x.w)) - log_sigmoid(-beta * ratio(x.l))


def apo_zero(x, beta):
    return 1 - sigmoid(beta * ratio(x.w)) + sigmoid(beta * ratio(x.l))


def apo_down(x, beta):
    return sigmoid(beta * ratio(x.w)) + 1 - sigmoid(beta * (ratio(x.w) - ratio(x.l)))


def simpo(x, beta, gamma):
    return -log_sigmoid(beta * (x.w.p / max(x.w.n, 1) - x.l.p / max(x.l.n, 1)) - gamma)


def sft(x):
    return -x.w.p / x.mean_chosen


def wpo(x, beta, **f):
    likely = [math.exp(y.p / max(y.n, 1)) / math.exp(y.c / max(y.n, 1)) for y in (x.w, x.l)]
    return likely[0] * likely[1] * dpo(x, beta, **f)


def ld_dpo(x, beta, ld_alpha, **f):
    """Shared tokens in full, the rest of each answer times ld_alpha."""

    def weighed(y):
        p, ref = (a + ld_alpha * (b - a) for a, b in ((y.p_shared, y.p), (y.ref_shared, y.ref)))
        return fprime(SimpleNamespace(p=p, ref=ref), **f)

    return -log_sigmoid(beta * (weighed(x.w) - weighed(x.l)))


def optimism(x, beta, alpha):
    return alpha * beta * ratio(x.e)


def selm(x, beta, alpha):
    return dpo(x, beta) + optimism(x, beta, alpha)


def xpo(x, beta, alpha):
    return dpo(x, beta) + alpha * x.e.p


def vpo(x, beta, alpha, sign="optimistic"):
    term = alpha * beta * ratio(x.e)
    return dpo(x, beta) + (term if sign == "optimistic" else -term)


def se_popo(x, beta, alpha):
    return dpo(x, beta) + alpha / beta * (sigmoid(beta * ratio(x.e)) - 0.5)


def copo(x, beta, alpha):
    return dpo(x, beta) - alpha * min(math.exp(ratio(x.e)), 5) * 0.1 * x.bonus * x.e.p


def geb(
    x, beta, alpha, divergence="kl", atom="complement", bonus_of="explore", length_normalized=False
):
    y = x.e if bonus_of == "explore" else x.l
    p = math.exp(y.p / max(y.n, 1) if length_normalized else y.p)
    f = {"kl": {}, "hellinger": {"f_divergence": "alpha_divergence", "f_alpha": 0.5},
         "forward_kl": {"f_divergence": "forward_kl"}}[divergence]  # fmt: skip
    if atom == "complement":
        of = {"kl": lambda: -p, "hellinger": lambda: math.sqrt(1.5 - p),
              "forward_kl": lambda: math.log(1 - p)}  # fmt: skip
    elif atom == "inverse":
        of = {"kl": lambda: 1 / (p + 1e-5), "hellinger": lambda: 1 / (math.sqrt(p) + 1e-5),
              "forward_kl": lambda: -math.log(p)}  # fmt: skip
    else:
        a = math.atanh(1 - p - 1e-5)
        of = {"kl": lambda: a, "hellinger": lambda: math.sqrt(a + 0.5),
              "forward_kl": lambda: math.log(a)}  # fmt: skip
    return dpo(x, beta, **f) - alpha * of[divergence]()


def wins(a, b, temperature=1.0):
    return sigmoid((a.s - b.s) / temperature)


def sppo_hard(x, beta):
    return (ratio(x.w) - 0.5 / beta) ** 2 + (ratio(x.l) + 0.5 / beta) ** 2


def sppo(x, beta, temperature=1.0):
    won, lost = wins(x.w, x.l, temperature), wins(x.l, x.w, temperature)
    return ((ratio(x.w) - (won - 0.5) / beta) ** 2 + (ratio(x.l) - (lost - 0.5) / beta) ** 2) / 2


def ipo_online(x, beta, temperature=1.0):
    return (margin(x) - (wins(x.w, x.l, temperature) - 0.5) / beta) ** 2


def inpo(x, beta, start_share):
    return (margin(x) - 0.5 / beta) ** 2  # of the mixed reference; see test_inpo


def nash(x, beta, temperature=1.0):
    return (margin(x) - (wins(x.w, x.e, temperature) - wins(x.l, x.e, temperature)) / beta) ** 2


FORMULAS = {
    f.__name__: f
    for f in (
        *(dpo, cdpo, robust, ipo, hinge, sigmoid_norm, exo_pair, discopop, nca_pair, bco_pair),
        *(apo_zero, apo_down, simpo, sft, wpo, ld_dpo, optimism, selm, xpo, vpo, se_popo),
        *(copo, geb, sppo_hard, sppo, ipo_online, inpo, nash),
    )
}
