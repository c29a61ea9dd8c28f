"""Counts a judge's malformed answers in an evaluation, and stops if there are more than allowed.

In a run a malformed answer only costs a pair (`on_malformed`). In an evaluation it would change a
reported number, so the user must allow it explicitly.
"""

from __future__ import annotations

from dataclasses import dataclass

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.cost import judges
from selm_jax.feedback.judge.unread import PATIENCE
from selm_jax.feedback.ranker import Ranker, counted, reported


@dataclass
class Malformed:
    """Counts of all judges' answers in one evaluation, and of the malformed answers among them.

    Attributes:
      allowed: how many may be malformed.
      counted_as: how malformed answers count in the results, for messages.
      answers, malformed: counts so far.
    """

    allowed: int
    counted_as: str
    answers: int = 0
    malformed: int = 0

    def watch(self, ranker: Ranker, askings: int = 1) -> None:
        """Makes the ranker's judges tolerate as many malformed answers as the evaluation allows.

        Args:
          askings: how often each answer is requested.
        """
        for judge in judges(ranker):
            judge.watch.restart(
                PATIENCE + askings * self.allowed,
                "Or allow a number of them with --allow-malformed, which counts them as "
                f"{self.counted_as}.",
            )

    def add(self, ranker: Ranker) -> int:
        """Adds the counts of the ranker's last call; returns how many answers were malformed.

        Raises:
          EvaluationError: more answers are malformed than allowed.
        """
        report = reported(ranker)
        found = counted(report, "malformed")
        self.answers += counted(report, "asked")
        self.malformed += found
        if self.malformed > self.allowed:
            asked = judges(ranker)
            example = next((f", such as {j.unread[0]}" for j in asked if j.unread), "")
            files = ", ".join(dict.fromkeys(str(j.client.cache) for j in asked))
            raise EvaluationError(
                f"the ranker {ranker.name}: {self.malformed} of {self.answers} answers so far "
                f"could not be read{example}. No result was written. Readable answers are in the "
                f"judge's cache{files and f' ({files})'}; the others will be requested again. "
                "Change the judge or its template, or accept this with --allow-malformed "
                f"{self.malformed}, which counts them as {self.counted_as}."
            )
        return found

    @property
    def record(self) -> dict[str, int]:
        """The counts to store with the results; empty if no judge was used."""
        if not self.answers:
            return {}
        return {
            "judge_answers": self.answers, "malformed": self.malformed,
            "allow_malformed": self.allowed,
        }  # fmt: skip


def unread_line(report: dict, counted_as: str) -> str:
    """A note for the terminal on the judge's malformed answers; "" if there were none."""
    if not report.get("malformed"):
        return ""
    return (
        f"{report['malformed']} of {report['judge_answers']} answers of the judge could not be "
        f"read; they count as {counted_as}"
    )
