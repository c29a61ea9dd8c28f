"""People as a ranker: reads their rankings from the store that `selm annotate` fills.

An answer's score is the share of its prompt's other answers that it beats (a tie counts half),
averaged over the people who ranked the prompt. Scores are comparable only within one prompt.
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
from selm_jax.shell import mirror
from selm_jax.shell.pace import here
from selm_jax.shell.paths import place
from selm_jax.shell.ranges import Count

STORE = "annotations.sqlite"  # in the run folder, unless the settings name another file
_POLL = 1.0  # seconds between two looks at the store


@dataclass
class Human:
    """A ranker whose scores come from people's rankings. Build it with `human`.

    Call `collect` first: it shows the questions to people and returns which prompts enough people
    have ranked. `scores` works for these prompts.
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
        """Stores the questions for `selm annotate`; if `wait` is set, waits for people's rankings.

        The wait ends when `minimum` people have ranked or skipped every question. Prompts with
        fewer than two different answers are shown to nobody: their answers are equal.

        Args:
            folder: the run folder, which contains the store unless the settings name another file.
            batch: a name for these questions, such as `iteration_1`.
            progress: called with the number of newly finished questions.

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
            here.sign()  # people may take days
            time.sleep(_POLL)
        judgements = store.judgements(batch)
        self._read(judgements)
        self.told["questions"] = now.questions
        return [item is None or item.digest in self.judged for item in items]

    def scores(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> list[Float64[np.ndarray, " candidates"]]:
        """Scores the candidates: one float64 array per question; see `ranker.Ranker`.

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
                    f"ranker 'human', prompt {question.id!r}: fewer than {self.minimum} people "
                    "have ranked its candidates. Rank them with `selm annotate`."
                )
            of_text = mean_shares(self.judged[item.digest])
            found.append(np.array([of_text[item.answers.index(text)] for text in texts]))
        return check_scores(self.name, questions, candidates, found)

    def report(self) -> dict[str, int | float]:
        """Counts of the last `collect`: `questions`, `rankings`, `skips`, `annotators`, `hours`.

        Also `alpha` (Krippendorff's) if two people ranked the same prompt.
        """
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
    """Converts questions to annotation items with distinct answers; None for a single answer."""
    items = []
    for question, texts in zip(questions, candidates, strict=True):
        distinct = tuple(dict.fromkeys(texts))
        messages = tuple((m.role, m.content) for m in question.messages)
        items.append(Item(question.id, messages, distinct) if len(distinct) > 1 else None)
    return items


def human(
    store: str | None = None, wait: bool = True, minimum: Count = 1, instructions: str = ""
) -> Human:
    """Makes a ranker from people, who rank the candidates on the page of `selm annotate`.

    Args:
        store: file of the rankings, on a local disk; by default `annotations.sqlite` in the run
            folder.
        wait: whether the stage waits until all prompts are ranked or skipped. If not, prompts that
            too few people have ranked give no pair, and are counted.
        minimum: how many people must rank each prompt.
        instructions: what annotators read above every question, in Markdown.

    Raises:
        FeedbackError: a setting is invalid.
    """
    if not isinstance(wait, bool):
        raise FeedbackError(f"ranker 'human': wait is {wait!r}; expected true or false.")
    if not isinstance(instructions, str):
        raise FeedbackError(f"ranker 'human': instructions is {instructions!r}; expected a string.")
    return Human(place(store) if store else None, wait, minimum)


def store_of(folder: Path, settings: Mapping[str, Any]) -> Path:
    """The SQLite file of people's rankings for a run whose `human` ranker has these settings.

    Raises:
        FeedbackError: the run is in a bucket, where no database can be.
    """
    if named := settings.get("store"):
        return place(named)
    if mirror.of(folder) is not None:
        raise FeedbackError(
            "ranker 'human': the run folder is in a bucket, where the rankings cannot be. Name a "
            "file on a local disk as feedback.settings.store."
        )
    return folder / STORE
