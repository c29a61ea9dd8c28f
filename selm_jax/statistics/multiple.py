"""Holm's correction for several tests at once."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def holm(p: Float[np.ndarray, " tests"]) -> Float[np.ndarray, " tests"]:
    """Adjusts p-values so that at most 5 % of families of tests have a false positive (p < 0.05).

    Holm, Scandinavian Journal of Statistics 6, 1979. It needs no assumption about how the tests
    depend on each other. (scipy has only corrections of the false discovery rate, and statsmodels,
    which has this one, would bring pandas.)
    """
    order = np.argsort(p, kind="stable")
    steps = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1)
    return adjusted
