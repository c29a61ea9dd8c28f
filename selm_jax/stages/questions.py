"""Puts the questions that people rank in an iteration into the annotation store."""

from __future__ import annotations

from selm_jax.annotate.store import AnnotationError, Annotations
from selm_jax.run.inputs import StoredTable
from selm_jax.run.run import Run
from selm_jax.stages.rank import pool_of, rank
from selm_jax.stages.ranking import people
from selm_jax.stages.step import Step


def put_questions(run: Run, t: int, minimum: int | None = None) -> tuple[Annotations, str]:
    """Puts an iteration's questions into the annotation store; see `people.put`.

    Returns:
      the store, and the name of the batch of questions.

    Raises:
      AnnotationError: there is nothing to rank, or the ranker waits for another number of people.
    """
    if run.experiment.taught:
        raise AnnotationError(
            f"{run.folder.path}: there is nothing to rank, because the experiment trains on the "
            "data set's own answers. Set candidates.greedy or candidates.samples to rank answers"
        )
    step = Step.of(run, rank.name, t, rank.keys(run))
    responses = StoredTable(step.folder, "responses")
    looked_at = run.looked_at(t, run.policy(t - 1))
    pool = pool_of(step, run.prompts(t), responses, run.chat, *looked_at)
    batch = people.batch(step.run, t)
    return people.put(run.folder.path, run.experiment.feedback, batch, pool, minimum), batch
