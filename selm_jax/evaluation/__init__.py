"""Evaluation: what a checkpoint says, how good that is, and how sure one may be of it.

`frontier` is what a run measures of itself after each iteration; the other modules are the verbs
of `selm eval`. A model is made ready once, in `model`; what a verb will cost stands in `cost`.
"""


class EvaluationError(ValueError):
    """An evaluation that cannot be made as asked. The message says why and what to do."""
