"""`selm eval alpaca_eval`."""

from __future__ import annotations

from selm_jax.evaluation.benchmarks.alpaca_eval.options import Options
from selm_jax.evaluation.command import app
from selm_jax.shell.verbs import verb


@verb(app)
def alpaca_eval(options: Options) -> None:
    """AlpacaEval 2.0: answer, annotate, score.

    Costs 805 answers of at most --max-new-tokens tokens and, with --judge or --annotator, 805 judge
    calls of one token, which read about 1,000 tokens each. Without a judge it stops at
    model_outputs.json. Started again, it goes on from what is there.
    """
    from selm_jax.evaluation.benchmarks.alpaca_eval.run import run

    run(options)
