"""Makes rankers, which score answers, from a name or from your own function."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from selm_jax.api.answers import Answers
from selm_jax.api.errors import ApiError, refuse_settings
from selm_jax.api.prompts import PromptLike, read_prompts
from selm_jax.feedback import ranker as rankers
from selm_jax.feedback.rules import RuleRanker

Scores = list[Float64[np.ndarray, " answers"]]
Function = Callable[[str, str, dict[str, Any]], float]


class Ranker:
    """Scores answers: `ranker(prompts, answers)`. `selm.ranker` returns one.

    Attributes:
      inner: the ranker in the form that a run uses.
    """

    def __init__(self, inner: rankers.Ranker):
        self.inner = inner

    def __call__(
        self,
        prompts: Sequence[PromptLike],
        answers: Answers | Sequence[Sequence[str]],
        rows: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        """Scores every answer; higher is better, and the unit depends on the ranker.

        Args:
          prompts: the prompts that were answered.
          answers: the answers from `Model.generate`, or a list of texts for each prompt.
          rows: other columns that the ranker reads, for each prompt, such as `{"target": "Paris"}`.

        Returns:
          A float64 array `[answers]` for each prompt. NaN means that a judge's reply could not be
          read.

        Raises:
          ApiError: the lists do not have the same length.
          FeedbackError: the ranker cannot score an answer; the message gives the prompt's place.

        >>> ranker("length", target=3)(["Say yes."], [["Yes.", "Yes, of course I will."]])
        [array([ -1., -19.])]
        """
        read = read_prompts(prompts)
        texts = answers.texts if isinstance(answers, Answers) else [list(each) for each in answers]
        if not len(read) == len(texts) == len(rows or read):
            raise ApiError(
                f"there are {len(read)} prompts, answers to {len(texts)} and rows for "
                f"{len(rows or read)}. Give the same number of each"
            )
        questions = [
            rankers.Question(each.messages[-1].content, each.messages, row, each.id)
            for each, row in zip(read, rows or [{}] * len(read), strict=True)
        ]
        rankers.check_asked(self.inner, questions)
        return self.inner.scores(questions, texts)

    def __repr__(self) -> str:
        return f"ranker {self.inner.name}"


def ranker(name: str | Function, /, **settings: Any) -> Ranker:
    """Makes a ranker from its name in an experiment file (`feedback.ranker`), or from a function.

    Args:
      name: "sentiment", "length", "regex", "pairrm", "reward_model", "verifiable", "judge",
        "mixture", `package.module:function`, or a function `(prompt, answer, row) -> number`,
        which is called in this process.
      settings: the ranker's settings, as in `feedback.settings`.

    Raises:
      FeedbackError: the name is unknown, or the ranker does not have a setting.
      ApiError: a function was given settings.

    >>> polite = ranker(lambda prompt, answer, row: float("please" in answer))
    >>> polite(["Ask for tea."], [["Tea.", "Tea, please."]])
    [array([0., 1.])]
    """
    if isinstance(name, str):
        return Ranker(rankers.build_ranker(name, **settings))
    refuse_settings(settings)
    return Ranker(RuleRanker(getattr(name, "__name__", "function"), name))
