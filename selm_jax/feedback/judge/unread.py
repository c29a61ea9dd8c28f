"""Answers of a judge that say nothing readable: how many there are, and when they are too many.

A few of them cost a pair or a number each. A judge most of whose answers cannot be read is the wrong
model, or has the wrong template, and is stopped before it has been asked everything.
"""

from __future__ import annotations

from dataclasses import dataclass

from selm_jax.feedback.judge.budget import JudgeError

PATIENCE = 20


class UnreadableJudge(JudgeError):
    """Most of a judge's answers cannot be read."""


@dataclass
class Unread:
    """Counts a judge's answers over all its `scores`.

    Attributes:
        judge: names it in errors.
        patience: so many unreadable answers, and more than half of all, stop it.
        or_else: another way out than to change the judge, for the error; a sentence.
        answers, malformed: so far.
        first: the first malformed one, in words; "" if there is none.
    """

    judge: str
    patience: int = PATIENCE
    or_else: str = ""
    answers: int = 0
    malformed: int = 0
    first: str = ""

    def restart(self, patience: int, or_else: str) -> None:
        """Counts from nothing again, with this patience."""
        self.patience, self.or_else = patience, or_else
        self.answers, self.malformed, self.first = 0, 0, ""

    def add(self, about: str | None) -> None:
        """Counts one answer: `about` is None if it could be read, else says which it is and how it ends.

        Raises:
            UnreadableJudge: they are too many now.
        """
        self.answers += 1
        if about is None:
            return
        self.malformed += 1
        self.first = self.first or about
        if self.malformed >= self.patience:
            self.end()

    def end(self) -> None:
        """Looks once more when nothing else is asked, which may have been too little for `add`.

        Raises:
            UnreadableJudge: most answers could not be read.
        """
        if mostly(self.malformed, self.answers):
            raise too_many(self.judge, self.malformed, self.answers, self.first, self.or_else)


def mostly(malformed: int, answers: int) -> bool:
    return 2 * malformed > answers


def too_many(
    judge: str, malformed: int, answers: int, example: str = "", or_else: str = ""
) -> UnreadableJudge:
    such = f", such as {example}" if example else ""
    return UnreadableJudge(
        f"{judge}: {malformed} of the first {answers} answers could not be read{such}. Ask another "
        "model, or change the judge's form, template or max_tokens. They are not kept: when the judge "
        f"is mended, the same command asks for them again.{or_else and f' {or_else}'}"
    )
