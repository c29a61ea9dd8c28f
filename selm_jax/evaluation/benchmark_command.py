"""All verbs of `selm eval`: importing a verb's module adds it to `app`."""

from selm_jax.evaluation import alpaca_eval_command, mt_bench_command  # noqa: F401
from selm_jax.evaluation.command import app

__all__ = ["app"]
