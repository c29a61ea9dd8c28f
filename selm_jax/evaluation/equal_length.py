"""Estimates the win rate at equal length, by logistic regression of wins on length.

The shares y of model A's wins over model B are modelled as

    y ~ sigmoid(theta + phi * tanh((length A - length B) / s))

where s is the standard deviation (ddof 1) of the differences in characters. This is AlpacaEval 2's
`length_controlled_v1` without its term for instruction difficulty, which is fitted on that
benchmark's leaderboard and does not exist for other prompts. The rate is sigmoid(theta): the
expected share for answers of equal length. The fit uses Newton's method with the penalty
0.005 theta^2 + 0.5 phi^2 on the summed loss: the first term keeps theta finite if one side wins
everything, the second keeps phi near 0 unless the data show an effect of length. Both terms of the
model change sign if A and B are swapped, so the rates of A against B and of B against A sum to 1.

The interval is over prompts, each with all its answers. It contains every theta that the data do
not contradict: with phi refitted, the score of theta is within 1.96 of its standard errors (Rao's
score test, Proceedings of the Cambridge Philosophical Society 44, 1948). Without differences in
length this is Wilson's interval (`proportions`), which is not a point even if one side wins all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import optimize

from selm_jax.evaluation import EvaluationError
from selm_jax.statistics import proportions
from selm_jax.statistics.intervals import Estimate

RIDGE = (0.01, 1.0)  # penalties of theta and phi
_FARTHEST = 30.0  # the rate of this theta is 1 (or 0) up to 1e-13


@dataclass(frozen=True)
class Comparisons:
    """Comparisons of model A with model B: A's wins from 0 to 1, and differences in length.

    Attributes:
      y: A's win.
      x: tanh of the difference in length, in standard deviations.
      prompt: the number of each comparison's prompt, from 0.
      weight: the weight of each comparison; those of a prompt sum to 1.
    """

    y: Float[np.ndarray, " answers"]
    x: Float[np.ndarray, " answers"]
    prompt: np.ndarray
    weight: Float[np.ndarray, " answers"]

    @staticmethod
    def of(
        y: Float[np.ndarray, " answers"],
        lengths: Float[np.ndarray, "answers 2"],
        prompt: np.ndarray,
    ) -> Comparisons:
        """Builds comparisons from A's wins and from both answers' lengths in characters."""
        delta = lengths[:, 0] - lengths[:, 1]
        spread = delta.std(ddof=1) if len(delta) > 1 else 0.0
        x = np.tanh(delta / spread) if spread else np.zeros_like(delta)
        return Comparisons(y, x, prompt, (1 / np.bincount(prompt))[prompt])

    def rates(self, theta: float, phi: float) -> Float[np.ndarray, " answers"]:
        return _sigmoid(theta + phi * self.x)


def fit(data: Comparisons) -> tuple[float, float]:
    """Fits the logistic model of wins: theta, its intercept, and phi, the effect of length."""
    features = np.stack([np.ones_like(data.x), data.x])  # [2, answers]
    b = np.zeros(2)
    for _ in range(100):
        p = data.rates(*b)
        gradient = features @ (data.weight * (data.y - p)) - RIDGE * b
        curvature = (features * data.weight * p * (1 - p)) @ features.T + np.diag(RIDGE)
        step = np.linalg.solve(curvature, gradient)
        b += np.clip(step, -2, 2)  # the loss is convex; a first step from 0 may go too far
        if np.abs(step).max() < 1e-10:
            return float(b[0]), float(b[1])
    raise EvaluationError(
        "the length-controlled fit did not converge. Check the answers: lengths may be extreme"
    )


def estimate(data: Comparisons) -> Estimate:
    """Estimates the win rate at equal length, with its confidence interval."""
    theta, phi = fit(data)
    p = data.rates(theta, phi)
    observed = np.square(np.bincount(data.prompt, data.weight * (data.y - p))).sum()
    dispersion = proportions.dispersion(observed, float((data.weight * p * (1 - p)).sum()))

    def standing(at: float) -> float:
        """The score statistic at theta = `at`, divided by its standard error."""
        beside = _beside(data, at)
        score = float((data.weight * (data.y - data.rates(at, beside))).sum())
        return score / np.sqrt(dispersion * _information(data, at, beside))

    low = _crossing(standing, proportions.Z, theta, -_FARTHEST)
    high = _crossing(standing, -proportions.Z, theta, _FARTHEST)
    rate = float(_sigmoid(theta))
    prompts = len(np.unique(data.prompt))
    error = np.sqrt(dispersion / _information(data, theta, phi)) * rate * (1 - rate)
    stderr = float(error) if prompts > 1 else None
    return Estimate(rate, stderr, low, high, prompts=prompts)


def _beside(data: Comparisons, theta: float) -> float:
    """Fits phi, the effect of length, for a given theta: the root of the penalised score."""

    def score(phi: float) -> float:
        return float((data.weight * data.x * (data.y - data.rates(theta, phi))).sum()) - (
            RIDGE[1] * phi
        )

    most = float(data.weight @ np.abs(data.x)) / RIDGE[1] + 1e-9
    return _root(score, -most, most)


def _information(data: Comparisons, theta: float, phi: float) -> float:
    """The Fisher information about theta if phi is estimated too."""
    p = data.rates(theta, phi)
    w = data.weight * p * (1 - p)
    along = float(w @ data.x) / (float(w @ data.x**2) + RIDGE[1])
    return float(w @ (1 - along * data.x) ** 2)


def _crossing(
    standing: Callable[[float], float], level: float, inside: float, outside: float
) -> float:
    """One end of the confidence interval: the win rate where the score statistic is `level`.

    The search goes from theta `inside` to `outside`; if there is no such theta, the end is 0 or 1.
    """
    if abs(standing(outside)) < abs(level):
        return float(outside > 0)
    return float(_sigmoid(_root(lambda t: standing(t) - level, inside, outside)))


def _root(f: Callable[[float], float], one: float, other: float) -> float:
    found: Any = optimize.brentq(f, one, other)
    return found


def _sigmoid(x):
    return 1 / (1 + np.exp(-x))
