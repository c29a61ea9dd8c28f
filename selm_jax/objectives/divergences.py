"""f-DPO: the score of a response where another divergence than the reverse KL holds the policy.

With a penalty of beta * D_f(pi || pi_ref), a response's implicit reward is beta * f'(t) + c(prompt)
with t = pi / pi_ref (arXiv 2309.16240, theorem 1), so a loss of the margin uses f'(t) as its score:

    reverse_kl         log t                        plain DPO: the log-ratio r
    forward_kl         1 - 1/t
    js_divergence      log(2t / (1 + t))
    alpha_divergence   (t^(a-1) - 1) / (a - 1)      a = f_alpha; log t for a = 1

The unknown c(prompt) cancels in the margin alone. A loss that uses the two rewards separately, such
as nca_pair, therefore has no such form and refuses `f_divergence`, as in TRL 1.16.
"""

import math
from functools import partial

import jax.numpy as jnp
from jax.nn import log_sigmoid

from selm_jax.objectives.objective import Logps, PerExample, Score, check

LARGEST = 40.0  # the largest exponent: ipo squares the score, and exp(80) is within float32


def divergence_score(f_divergence: str, f_alpha: float) -> Score:
    """f'(pi / pi_ref) of a response; exponents are limited to `LARGEST`."""
    check(f_divergence=f_divergence, f_alpha=f_alpha)
    if f_divergence == "js_divergence":
        return _js
    power = {"forward_kl": -1.0, "alpha_divergence": f_alpha - 1.0}.get(f_divergence, 0.0)
    return partial(_power, power=power) if abs(power) > 1e-6 else Logps.log_ratio


def _power(logps: Logps, role: str, power: float) -> PerExample:
    return jnp.expm1(jnp.minimum(power * logps.log_ratio(role), LARGEST)) / power


def _js(logps: Logps, role: str) -> PerExample:
    return math.log(2) + log_sigmoid(logps.log_ratio(role))
