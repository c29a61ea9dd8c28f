"""Answers of a judge that could not be read: counted, and no more of them than are allowed.

In a run such an answer costs a pair (`on_malformed`), and the run goes on. A measurement is reported:
what it says for an answer that was never understood must have been accepted first.
"""

from __future__ import annotations

from dataclasses import dataclass

from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.cost import judges
from selm_jax.feedback.ranker import Ranker, reported


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

    def add(self, ranker: Ranker) -> int:
        """Adds the ranker's last `scores`; how many malformed answers it met there.

        Raises:
          EvaluationError: there are now more than allowed.
        """
        found = _told(ranker, "malformed")
        self.answers += _told(ranker, "asked")
        self.malformed += found
        if self.malformed > self.allowed:
            asked = judges(ranker)
            example = next((f", such as {j.unread[0]}" for j in asked if j.unread), "")
            files = ", ".join(dict.fromkeys(str(j.client.cache) for j in asked))
            raise EvaluationError(
                f"the ranker {ranker.name}: {self.malformed} of {self.answers} answers so far could "
                f"not be read{example}. No result was written; what was paid for is in the judge's "
                f"cache{files and f' ({files})'}. Change the judge or its template (a judge that is "
                "repaired and keeps its name needs another cache), or accept it with "
                f"--allow-malformed {self.malformed}, which counts them as {self.counted_as}."
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


def _told(ranker: Ranker, what: str) -> int:
    """The sum of a count over the parts of a mixture, which stand in its report under their names."""
    return sum(int(n) for key, n in reported(ranker).items() if key.rpartition("/")[2] == what)
