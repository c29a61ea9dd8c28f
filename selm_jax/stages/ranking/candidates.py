"""Collects the candidates of each prompt: the policy's answers, then the data set's answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from selm_jax.feedback.ranker import Question
from selm_jax.preferences.candidates import Candidate
from selm_jax.preferences.examples import Ids
from selm_jax.run.rows import question
from selm_jax.tables import ranked, responses
from selm_jax.text.answers import answers
from selm_jax.text.chat import Chat, UnusableAnswer
from selm_jax.text.prompts import Prompt


@dataclasses.dataclass(frozen=True)
class OfData:
    """Turns the data set's own answers into candidates.

    Attributes:
      layout: `text.layout`. Only the default layout gives candidates token ids; the others
        tokenise whole pairs later.
      ids: returns the token ids of an answer to a prompt (`Task.candidate_ids`).
      on_bad_row: `data.on_bad_row`; "error" raises for an answer that cannot be used.
    """

    chat: Chat
    layout: str
    ids: Callable[[Chat, Prompt, str], Ids | None]
    on_bad_row: str

    def candidate(self, prompt: Prompt, source: str) -> tuple[Candidate, bool]:
        """Returns (the answer `chosen` or `rejected` as a candidate, whether it can be used).

        Raises:
          UnusableAnswer: the answer cannot be used, and bad rows are errors.
        """
        ids, usable = None, True
        if self.layout == "default":
            try:
                ids = self.ids(self.chat, prompt, source)
            except UnusableAnswer:
                if self.on_bad_row == "error":
                    raise
                usable = False
        return Candidate(source, answers(prompt)[source], ids, "dataset", 0), usable


@dataclasses.dataclass(frozen=True)
class Pool:
    """The prompts of an iteration with all their candidates, before they are ranked.

    Attributes:
      usable: for each prompt, whether all its answers can be used.
      asked: the indices of the prompts that the ranker is asked about.
      cost: counts of the work that choosing these prompts took.
    """

    prompts: Sequence[Prompt]
    candidates: Sequence[Sequence[Candidate]]
    usable: Sequence[bool]
    asked: Sequence[int]
    cost: dict[str, int]

    def questions(self, which: Sequence[int]) -> tuple[list[Question], list[list[str]]]:
        """The inputs of a ranker for the prompts `which`: (questions, candidates' texts)."""
        texts = [[each.text for each in self.candidates[i]] for i in which]
        return [question(self.prompts[i]) for i in which], texts


def pool(prompts: Sequence[Prompt], drawn: Iterable[responses.Row], of_data: OfData | None) -> Pool:
    """All candidates of the prompts, in the authors' order: the policy's, chosen, rejected.

    Args:
      drawn: the policy's answers to all prompts.
      of_data: turns the data set's answers into candidates; None leaves these answers out.
    """
    own: dict[str, list[Candidate]] = {prompt.id: [] for prompt in prompts}
    for row in drawn:
        candidate = Candidate(row.kind, row.text, row.token_ids, row.finish, row.sample)
        own.setdefault(row.prompt_id, []).append(candidate)
    candidates, usable = [], []
    for prompt in prompts:
        found = [] if of_data is None else [of_data.candidate(prompt, s) for s in answers(prompt)]
        candidates.append(own[prompt.id] + [candidate for candidate, _ in found])
        usable.append(all(able for _, able in found))
    asked = [i for i, able in enumerate(usable) if able]
    return Pool(prompts, candidates, usable, asked, {})


def row_of(prompt: Prompt, place: int, c: Candidate, **known: Any) -> ranked.Row:
    """The table row of a prompt's candidate number `place`; `known` has further columns."""
    text = prompt.messages[-1].content
    return ranked.Row(
        prompt.id, text, place, c.source, c.sample, c.token_ids, c.text, c.finish, **known
    )
