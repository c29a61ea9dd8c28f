"""Defines the command `selm eval alpaca_eval`."""

from __future__ import annotations

from selm_jax.evaluation.benchmarks.alpaca_eval.options import Options
from selm_jax.evaluation.command import app
from selm_jax.shell.verbs import verb


@verb(
    app,
    needs="a model, the baseline (--instructions hub fetches it), and a judge to score it",
    writes="model_outputs.json, annotations.json and scores into the folder of --out",
    example="selm eval alpaca_eval runs/selm --instructions hub --dry-run",
)
def alpaca_eval(options: Options) -> None:
    """Run AlpacaEval 2.0.

    The model gives 805 answers. With --judge or --annotator there are 805 judge calls; each reads
    about 1,000 tokens and writes one. Without a judge it stops at model_outputs.json. Run the
    same command again to continue.
    """
    from selm_jax.evaluation.benchmarks.alpaca_eval.run import run

    run(options)
