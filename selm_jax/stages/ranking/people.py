"""People as rankers of an iteration: what they are asked, and whom they have answered about."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from selm_jax.annotate.store import AnnotationError, Annotations
from selm_jax.config import Feedback
from selm_jax.feedback.human import Human, items_of, store_of
from selm_jax.stages.ranking.candidates import Pool


def put(
    folder: Path, feedback: Feedback, batch: str, pool: Pool, minimum: int | None = None
) -> Annotations:
    """Puts the pool's questions where people are asked them, whichever ranker the run has.

    Args:
      folder: the run's, which holds the store if the ranker's settings name no other.
      batch: what these questions are called.
      minimum: how many people are to rank each; None: as the ranker's settings say, or 1.

    Raises:
      AnnotationError: the ranker waits for another minimum.
    """
    human = feedback.ranker == "human"
    of_ranker = feedback.settings.get("minimum", 1) if human else None
    if minimum is not None and of_ranker not in (None, minimum):
        raise AnnotationError(
            f"the ranker waits for {of_ranker} people per prompt, found a minimum of {minimum}; "
            "change feedback.settings.minimum"
        )
    store = Annotations(store_of(folder, feedback.settings if human else {}))
    items = [item for item in items_of(*pool.questions(pool.asked)) if item is not None]
    store.put(batch, items, minimum or of_ranker or 1)
    return store


def answered(
    human: Human, folder: Path, batch: str, pool: Pool, report: Callable[[int], None]
) -> list[int]:
    """The prompts of the pool that enough people have ranked.

    Args:
      report: takes how many more questions are done.
    """
    found = human.collect(folder, batch, *pool.questions(pool.asked), report)
    return [i for i, ready in zip(pool.asked, found, strict=True) if ready]


def batch(run: str, t: int) -> str:
    """What the questions of a run's iteration are called."""
    return f"{run}/iteration_{t}"
