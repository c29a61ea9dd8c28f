"""Counts a judge's malformed answers, and raises an error when there are too many.

A few malformed answers only cost a pair or a number each. If most answers are malformed, the model
or the template is wrong, and the run stops before it has paid for all requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from selm_jax.feedback.judge.budget import JudgeError

PATIENCE = 20


class UnreadableJudge(JudgeError):
    """Most of a judge's answers are malformed."""


@dataclass
class Unread:
    """Counts a judge's answers over all calls of `scores`.

    Attributes:
        judge: the judge's name for errors.
        patience: stop when this many answers, and more than half of all, are malformed.
        or_else: a sentence for the error with an alternative to changing the judge.
        answers, malformed: counts so far.
        first: a description of the first malformed answer; "" if there is none.
    """

    judge: str
    patience: int = PATIENCE
    or_else: str = ""
    answers: int = 0
    malformed: int = 0
    first: str = ""

    def restart(self, patience: int, or_else: str) -> None:
        """Sets all counts to 0, and sets a new `patience` and `or_else`."""
        self.patience, self.or_else = patience, or_else
        self.answers, self.malformed, self.first = 0, 0, ""

    def add(self, about: str | None) -> None:
        """Counts one answer of the judge, and raises UnreadableJudge if too many are malformed.

        Args:
            about: None if the answer could be read; otherwise a description of it.

        Raises:
            UnreadableJudge: too many answers are malformed.
        """
        self.answers += 1
        if about is None:
            return
        self.malformed += 1
        self.first = self.first or about
        if self.malformed >= self.patience:
            self.end()

    def end(self) -> None:
        """Raises UnreadableJudge if most answers are malformed, however few there are."""
        if mostly(self.malformed, self.answers):
            raise too_many(self.judge, self.malformed, self.answers, self.first, self.or_else)


def mostly(malformed: int, answers: int) -> bool:
    return 2 * malformed > answers


def too_many(
    judge: str, malformed: int, answers: int, example: str = "", or_else: str = ""
) -> UnreadableJudge:
    such = f", such as {example}" if example else ""
    return UnreadableJudge(
        f"{judge}: {malformed} of the first {answers} answers could not be read{such}. Use another "
        "model, or change the judge's form, template or max_tokens. Unreadable answers are not "
        "kept: the same command requests them again after the judge is fixed."
        f"{or_else and f' {or_else}'}"
    )
