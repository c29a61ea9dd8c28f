"""Whether the rows of an experiment's data can be used: looked at before any work is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from selm_jax.config import Experiment
from selm_jax.feedback.ranker import Question
from selm_jax.objectives.losses import Objective
from selm_jax.preferences.own_answers import OwnAnswers
from selm_jax.text.prompts import Prompt, PromptSet


class RunError(ValueError):
    """The experiment and its data do not fit together."""


def told_of(name: str, rows: PromptSet) -> Iterator[str]:
    """What was done with rows and columns that is not as somebody may expect, in words."""
    for note in rows.notes:
        yield f"{name}: {note}"
    for reason, numbers in rows.dropped.items():
        yield f"{name}: rows left out, {reason}: {len(numbers):,}"


def check_own_answers(
    own: OwnAnswers, prompts: Sequence[Prompt], report: Callable[[int], None], strict: bool
) -> None:
    """Lays out the data's own answers to every prompt.

    Args:
      report: is told that so many more are done.
      strict: whether answers that do not fit are an error; or somebody else counts them.

    Raises:
      RunError: answers do not fit the model or a row. The first prompt is named.
      UnusableAnswer, ExampleError: see `OwnAnswers.example`.
    """
    found = []
    for prompt in prompts:
        if why := own.misfit(prompt):
            found.append((prompt.id, why))
        report(1)
    if found and strict:
        name, why = found[0]
        raise RunError(
            f"prompt {name}: {why}. {len(found):,} of {len(prompts):,} prompts do not fit. Shorten "
            "these answers, or set data.on_bad_row to 'drop' to leave out and count such rows"
        )


def question(prompt: Prompt) -> Question:
    """A prompt as rankers see it."""
    return Question(prompt.messages[-1].content, prompt.messages, prompt.row, prompt.id)


def check_rated(e: Experiment, objective: Objective) -> None:
    """What a reward model's training asks of the experiment. Raises RunError if it is not so."""
    if not (e.taught and e.data.rejected):
        raise RunError(
            f"{objective} trains a reward model on pairs of the data set: name data.chosen "
            "and data.rejected, and set candidates: {greedy: 0, samples: 0, dataset: true}"
        )
    if e.lora is not None:
        raise RunError(
            f"{objective} trains a reward model, whose head adapters would leave at its "
            "zeros; all parameters are trained: set lora: null"
        )
    if e.text.layout != "default":
        raise RunError(
            f"{objective} reads whole conversations, of which text.layout: "
            f"{e.text.layout} knows nothing; set text.layout: default"
        )
