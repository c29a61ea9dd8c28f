"""`selm bench`: how fast this machine trains and answers, and how near that is to its peak.

One model, synthetic tokens, the same functions as a run uses: updates on packed prompt trees of
three distinct responses with stored reference log-probabilities, and the rollout engine. Times are
held against hand-counted floating point operations (`models.flops`).
"""

from selm_jax.bench.command import main, run
from selm_jax.bench.work import BenchError, Sizes

__all__ = ["BenchError", "Sizes", "main", "run"]
