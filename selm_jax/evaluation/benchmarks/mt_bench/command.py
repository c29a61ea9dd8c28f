"""Defines the command `selm eval mt_bench`."""

from __future__ import annotations

from selm_jax.evaluation.benchmarks.mt_bench.options import Options
from selm_jax.evaluation.command import app
from selm_jax.shell.verbs import verb


@verb(
    app,
    needs="a model, FastChat's files of MT-Bench, and a judge to score it",
    writes="answers, judgments and scores into the folder of --out",
    example="selm eval mt_bench runs/selm --questions question.jsonl --dry-run",
)
def mt_bench(options: Options) -> None:
    """Run MT-Bench.

    The model gives 160 answers, two for each of 80 questions. With --judge there are 160 judge
    calls, or 320 with --against, times --repeats. Without a judge it stops at the answers. Run the
    same command again to continue.
    """
    from selm_jax.evaluation.benchmarks.mt_bench.run import run

    run(options)
