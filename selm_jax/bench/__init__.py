"""`selm bench`: measures how fast this machine trains and generates, relative to its limits.

It measures one model on synthetic tokens with the functions that a run uses: updates on packed
prompt trees of three distinct responses with stored reference log-probabilities, and the rollout
engine. Times are compared with the least work: operations over the devices' peak, and, for
decoding, bytes over the bandwidth of their memory.
"""

from selm_jax.bench.command import main, run
from selm_jax.bench.work import BenchError, Sizes

__all__ = ["BenchError", "Sizes", "main", "run"]
