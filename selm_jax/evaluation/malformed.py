"""Answers of a judge that could not be read: counted, and no more of them than are allowed.

In a run such an answer costs a pair (`on_malformed`), and the run goes on. A measurement is reported:
what it says for an answer that was never understood must have been accepted first.
"""

from __future__ import annotations

from dataclasses import dataclass

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.cost import judges
from selm_jax.feedback.judge.unread import PATIENCE
from selm_jax.feedback.ranker import Ranker, counted, reported


@dataclass
class Malformed:
    """Of all that a ranker is asked in one evaluation.

    Attributes:
      allowed: so many may be malformed.
      counted_as: what stands for them then.
      answers, malformed: of the judges, so far.
    """

    allowed: int
    counted_as: str
    answers: int = 0
    malformed: int = 0

    def watch(self, ranker: Ranker, askings: int = 1) -> None:
        """Has the ranker's judges stop early only beyond what is allowed.

        Args:
          askings: how often each answer is asked for.
        """
        for judge in judges(ranker):
            judge.watch.restart(
                PATIENCE + askings * self.allowed,
                f"Or accept so many with --allow-malformed, which counts them as {self.counted_as}.",
            )

    def add(self, ranker: Ranker) -> int:
        """Adds the ranker's last `scores`; how many malformed answers it met there.

        Raises:
          EvaluationError: there are now more than allowed.
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
                f"the ranker {ranker.name}: {self.malformed} of {self.answers} answers so far could "
                f"not be read{example}. No result was written; what could be read is in the judge's "
                f"cache{files and f' ({files})'}, the rest is asked again. Change the judge or its "
                f"template, or accept it with --allow-malformed {self.malformed}, which counts them as "
                f"{self.counted_as}."
            )
        return found

    @property
    def record(self) -> dict[str, int]:
        """For the results; nothing where no judge was asked."""
        if not self.answers:
            return {}
        return {
            "judge_answers": self.answers, "malformed": self.malformed,
            "allow_malformed": self.allowed,
        }  # fmt: skip


def unread_line(report: dict, counted_as: str) -> str:
    """For the terminal; empty if all was read."""
    if not report.get("malformed"):
        return ""
    return (
        f"{report['malformed']} of {report['judge_answers']} answers of the judge could not be read; "
        f"they count as {counted_as}"
    )
