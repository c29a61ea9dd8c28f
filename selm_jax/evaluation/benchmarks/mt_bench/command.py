"""`selm eval mt_bench`."""

from __future__ import annotations

from selm_jax.evaluation.benchmarks.mt_bench.options import Options
from selm_jax.evaluation.command import app
from selm_jax.shell.verbs import verb


@verb(app)
def mt_bench(options: Options) -> None:
    """MT-Bench: answer 80 questions of two turns, have them rated or compared, score.

    Costs 160 answers of at most --max-new-tokens tokens and, with --judge, 160 judge calls for each
    of --repeats (320 with --against), of up to --judge-tokens tokens. Without a judge it stops at
    the answers. Started again, it goes on from what is there.
    """
    from selm_jax.evaluation.benchmarks.mt_bench.run import run

    run(options)
