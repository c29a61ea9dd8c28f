"""People as a ranker: their rankings, from the store that `selm annotate` fills.

The score of an answer is the mean share of the other answers of its prompt that it beats, a tie
counting half, over the people who ranked the prompt. It compares the answers of one prompt and
says nothing across prompts.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float64

from selm_jax.annotate.agreement import alpha, mean_shares
from selm_jax.annotate.store import Annotations, Item, Judgement
from selm_jax.feedback.ranker import FeedbackError, Question, check_questions, check_scores
from selm_jax.shell.paths import place
from selm_jax.shell.ranges import Count

STORE = "annotations.sqlite"  # in the run folder, where the settings name no other
_POLL = 1.0  # seconds between two looks at the store


@dataclass
class Human:
    """What people said. Build it with `human`.

    `collect` first: it puts the questions before people, and says which prompts have answers
    enough; `scores` is for these.
    """

    store: Path | None
    wait: bool
    minimum: int
    judged: dict[str, list[Judgement]] = field(default_factory=dict)  # question -> its rankings
    told: dict[str, int | float] = field(default_factory=dict)
    name: str = "human"

    def collect(
        self,
        folder: Path,
        batch: str,
        questions: Sequence[Question],
        candidates: Sequence[Sequence[str]],
        progress: Callable[[int], None] = lambda more: None,
    ) -> list[bool]:
        """Puts the questions where `selm annotate` finds them; waits for people if asked to.

        A wait ends when every question was ranked, or skipped, by `minimum` people. Prompts with
        fewer than two different answers are put before nobody: their answers are equal.

        Args:
            folder: the run's, which holds the store if the settings name none.
            batch: what these questions are called, such as `iteration_1`.
            progress: told how many more questions are done, each time that some are.

        Returns:
            For each prompt, whether it can be scored.
        """
        items = items_of(questions, candidates)
        store = Annotations(self.store or folder / STORE)
        store.put(batch, [item for item in items if item is not None], self.minimum)
        done = 0
        while True:
            now = store.progress(batch)
            progress(now.closed - done)
            done = now.closed
            if not self.wait or now.closed == now.questions:
                break
            time.sleep(_POLL)
        judgements = store.judgements(batch)
        self._read(judgements)
        self.told["questions"] = now.questions
        return [item is None or item.digest in self.judged for item in items]

    def scores(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> list[Float64[np.ndarray, " candidates"]]:
        """One float64 array `[candidates]` per question; see `ranker.Ranker`.

        Raises:
            FeedbackError: too few people have ranked a prompt.
        """
        check_questions(self.name, questions, candidates)
        found = []
        items = items_of(questions, candidates)
        for question, texts, item in zip(questions, candidates, items, strict=True):
            if item is None:
                found.append(np.full(len(texts), 0.5))
                continue
            if item.digest not in self.judged:
                raise FeedbackError(
                    f"ranker 'human', prompt {question.id!r}: nobody was asked, or fewer than "
                    f"{self.minimum} people answered. People rank an iteration's candidates "
                    "(`selm annotate`)."
                )
            of_text = mean_shares(self.judged[item.digest])
            found.append(np.array([of_text[item.answers.index(text)] for text in texts]))
        return check_scores(self.name, questions, candidates, found)

    def report(self) -> dict[str, int | float]:
        """Of the last `collect`: questions put, rankings, skips, people, the hours they took, and
        Krippendorff's alpha if two people ranked the same prompt."""
        return dict(self.told)

    def _read(self, judgements: Sequence[Judgement]) -> None:
        ranked = [j for j in judgements if j.ranks is not None]
        count = Counter(j.question for j in ranked)
        self.judged = {
            digest: [j for j in ranked if j.question == digest]
            for digest, people in count.items()
            if people >= self.minimum
        }
        self.told = {
            "rankings": len(ranked),
            "skips": len(judgements) - len(ranked),
            "annotators": len({j.annotator for j in judgements}),
            "hours": sum(j.seconds or 0.0 for j in judgements) / 3600,
        }
        if (agreement := alpha(ranked)) is not None:
            self.told["alpha"] = agreement


def items_of(
    questions: Sequence[Question], candidates: Sequence[Sequence[str]]
) -> list[Item | None]:
    """The questions as people see them: each text once. None where there are fewer than two."""
    items = []
    for question, texts in zip(questions, candidates, strict=True):
        distinct = tuple(dict.fromkeys(texts))
        messages = tuple((m.role, m.content) for m in question.messages)
        items.append(Item(question.id, messages, distinct) if len(distinct) > 1 else None)
    return items


def human(store: str | None = None, wait: bool = True, minimum: Count = 1) -> Human:
    """People who rank the candidates on the page of `selm annotate`.

    Args:
        store: file of the answers; by default `annotations.sqlite` in the run folder. On a local
            disk.
        wait: whether the stage waits until all is ranked or skipped. If not, prompts that too few
            people have ranked give no pair, and are counted.
        minimum: how many people are to rank each prompt.

    Raises:
        FeedbackError: a setting that cannot be used.
    """
    if not isinstance(wait, bool):
        raise FeedbackError(f"ranker 'human': wait is {wait!r}; expected true or false.")
    return Human(place(store) if store else None, wait, minimum)


def store_of(folder: Path, settings: Mapping[str, Any]) -> Path:
    """The file of answers of a run whose ranker has these settings."""
    named = settings.get("store")
    return place(named) if named else folder / STORE
