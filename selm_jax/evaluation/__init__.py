"""Evaluation of checkpoints: answers, scores and their intervals.

`frontier` has the measures that a run takes after each iteration; the other modules implement the
commands of `selm eval`. `model` opens models for all of them; `cost` estimates costs in advance.
"""


class EvaluationError(ValueError):
    """An evaluation cannot be done as requested. The message says why and what to do."""
