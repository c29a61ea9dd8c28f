"""Checks the rows of an experiment's data before any work is done."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence

from selm_jax.config import Data, Experiment
from selm_jax.feedback.ranker import Question
from selm_jax.shell.progress import Advance
from selm_jax.shell.threads import of_each
from selm_jax.text.chat import Chat, ChatError
from selm_jax.text.prompts import Prompt, PromptSet


class RunError(ValueError):
    """The experiment and its data do not fit together."""


def told_of(name: str, rows: PromptSet) -> Iterator[str]:
    """Yields notes for the user on rows and columns of a file that are not used as expected."""
    for note in rows.notes:
        yield f"{name}: {note}"
    for reason, numbers in rows.dropped.items():
        yield f"{name}: rows left out, {reason}: {len(numbers):,}"


def trained_too(heldout: Iterable[Prompt], trained: Iterable[Prompt]) -> list[Prompt]:
    """The prompts of `heldout` that also occur in `trained`.

    Prompts are compared by their text, without white space and system message.
    """
    seen = {_asked(prompt) for prompt in trained}
    return [prompt for prompt in heldout if _asked(prompt) in seen]


def told_of_overlap(d: Data, heldout: Sequence[Prompt], twice: Sequence[Prompt]) -> Iterator[str]:
    """Yields a note for the user if held-out prompts are also in the training data."""
    if twice:
        yield (
            f"{d.heldout}: {len(twice):,} of {len(heldout):,} held-out prompts are trained on too "
            f"(the first is {twice[0].id}): results on these prompts say nothing about new prompts"
        )


def check_heldout(d: Data, heldout: Sequence[Prompt], twice: Sequence[Prompt]) -> None:
    """Raises RunError if `data.heldout` and `data.train` name some of the same rows."""
    same = os.path.realpath(os.path.expanduser(d.train)) == os.path.realpath(
        os.path.expanduser(d.heldout or "")
    )
    parts = (d.train_split, d.train_config) == (d.heldout_split, d.heldout_config)
    if twice and same and parts:
        raise RunError(
            f"data.heldout: {d.heldout} is data.train, and {len(twice):,} of {len(heldout):,} "
            f"held-out prompts are trained on too (the first is {twice[0].id}), so they would "
            "measure memorisation. Name other rows: another file or split, or reserve the first "
            "rows for data.heldout with data.heldout_limit and data.skip. To evaluate on training "
            "prompts on purpose, name a copy of the file"
        )


def _asked(prompt: Prompt) -> tuple[tuple[str, str], ...]:
    return tuple(
        (m.role, " ".join(m.content.split())) for m in prompt.messages if m.role != "system"
    )


def check_own_answers(
    misfit: Callable[[Prompt], str | None],
    prompts: Sequence[Prompt],
    report: Advance,
    strict: bool,
) -> None:
    """Checks that the data's own answers to every prompt fit the model and a packed row.

    Args:
      misfit: returns why the answers to a prompt do not fit, or None; usually `OwnAnswers.misfit`.
      report: is called with the number of prompts that are done.
      strict: whether answers that do not fit are an error; if not, the caller counts them.

    Raises:
      RunError: answers do not fit the model or a row. The message names the first prompt.
      UnusableAnswer, ExampleError: see `OwnAnswers.example`.
    """
    reasons = of_each(misfit, prompts, lambda: report(1, 0))
    found = [(prompt.id, why) for prompt, why in zip(prompts, reasons, strict=True) if why]
    if found and strict:
        name, why = found[0]
        raise RunError(
            f"prompt {name}: {why}. {len(found):,} of {len(prompts):,} prompts do not fit. Shorten "
            "these answers, or set data.on_bad_row to 'drop' to leave out and count such rows"
        )


def check_batches(e: Experiment, prompts: Sequence[int]) -> None:
    """Raises RunError if an iteration cannot fill one batch with at most one pair per prompt.

    Args:
      prompts: the number of usable prompts of each iteration, starting with the first.
    """
    batch = e.training.global_batch
    for t, found in enumerate(prompts, 1):
        if found < batch:
            raise RunError(
                f"{e.data.train}: iteration {t} has {found:,} usable prompts, each of which gives "
                "at most one pair. That is fewer than one batch (training.global_batch = "
                f"{batch:,}). Set training.global_batch to {found:,} or less, or give each "
                "iteration more rows (see data.portions, data.skip and data.limit)"
            )


def question(prompt: Prompt) -> Question:
    """Converts a prompt to the form that rankers receive."""
    return Question(prompt.messages[-1].content, prompt.messages, prompt.row, prompt.id)


def prompt_ids(chat: Chat, prompt: Prompt) -> tuple[int, ...]:
    """The token ids of a prompt. Raises RunError, naming the prompt, if it cannot be encoded."""
    try:
        return chat.prompt_ids(prompt.messages)
    except ChatError as e:
        raise RunError(f"prompt {prompt.id}: {e}") from e
