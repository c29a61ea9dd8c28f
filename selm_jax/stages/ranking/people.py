"""Asks people to rank an iteration's candidates, and finds the prompts that they have ranked."""

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
    """Stores a pool's prompts and candidates as questions for people; the run may use any ranker.

    Args:
      folder: the run folder, which contains the store unless the ranker's settings name another.
      batch: the name of these questions.
      minimum: how many people must rank each question; None takes the ranker's setting, or 1.

    Raises:
      AnnotationError: the ranker waits for a different number of people.
    """
    human = feedback.ranker == "human"
    of_ranker = feedback.settings.get("minimum", 1) if human else None
    if minimum is not None and of_ranker not in (None, minimum):
        raise AnnotationError(
            f"the ranker waits for {of_ranker} people per prompt, but the minimum given is "
            f"{minimum}. Change feedback.settings.minimum, or give no other minimum"
        )
    store = Annotations(store_of(folder, feedback.settings if human else {}))
    items = [item for item in items_of(*pool.questions(pool.asked)) if item is not None]
    store.put(batch, items, minimum or of_ranker or 1)
    return store


def answered(
    human: Human, folder: Path, batch: str, pool: Pool, report: Callable[[int], None]
) -> list[int]:
    """The indices of the pool's prompts that enough people have ranked.

    Args:
      report: is called with the number of questions that are newly done.
    """
    found = human.collect(folder, batch, *pool.questions(pool.asked), report)
    return [i for i, ready in zip(pool.asked, found, strict=True) if ready]


def batch(run: str, t: int) -> str:
    """The name under which the questions of a run's iteration are stored."""
    return f"{run}/iteration_{t}"
