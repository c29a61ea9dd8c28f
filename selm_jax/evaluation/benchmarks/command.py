"""All commands of `selm eval`. Importing the module of a command adds it to `app`."""

from selm_jax.evaluation.benchmarks.alpaca_eval import command as _alpaca_eval  # noqa: F401
from selm_jax.evaluation.benchmarks.lm_eval import command as _lm_eval  # noqa: F401
from selm_jax.evaluation.benchmarks.mt_bench import command as _mt_bench  # noqa: F401
from selm_jax.evaluation.command import app

__all__ = ["app"]
