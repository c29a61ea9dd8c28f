"""The prompts of an experiment: which iteration uses which prompts, and their lengths."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

from selm_jax.config import Data as Settings
from selm_jax.config import Experiment, fixed_length
from selm_jax.parallel import multihost
from selm_jax.preferences.own_answers import OwnAnswers
from selm_jax.run.inputs import LazyTasks, StoredTable
from selm_jax.run.model import StartModel
from selm_jax.run.rows import RunError, prompt_ids, trained_too
from selm_jax.run.task import Sizes, Task
from selm_jax.shell.threads import of_each
from selm_jax.text.answers import longest_answered
from selm_jax.text.chat import Chat
from selm_jax.text.prompts import (
    Message,
    Part,
    Prompt,
    PromptSet,
    load_data,
    prompts_digest,
    rows_of,
)


class Data:
    """The data of an experiment, read on first use.

    Args:
      model: the model whose tokenizer measures texts. A plan may have none: then no prompt is left
        out as too long, and lengths are not available.
    """

    def __init__(self, experiment: Experiment, task: Task, model: StartModel | None):
        self.experiment, self.task, self._model = experiment, task, model

    @property
    def model(self) -> StartModel:
        assert self._model is not None, "without a model, prompts have no lengths in tokens"
        return self._model

    @property
    def chat(self) -> Chat:
        return self.model.chat

    # The prompts

    @cached_property
    def all_prompts(self) -> PromptSet:
        """Every usable row of `data.train`, with a record of the rows that were left out."""
        return self._read("train")

    def prompts(self, t: int) -> list[Prompt]:
        """The usable prompts of iteration t. Raises RunError if there are none."""
        d = self.experiment.data
        mine = rows_of(self.all_prompts.by_row(), t, self.experiment)
        found = [self.with_system(p) for p in mine if p is not None][: d.limit]
        if not found:
            raise RunError(
                f"{d.train}: none of the {len(mine)} rows of iteration {t} is usable. Correct the "
                "rows, or change data.skip, data.limit or data.portions to select others"
            )
        return found

    def every_prompt(self) -> Iterator[Prompt]:
        """Yields the prompts of all portions of the data, in the order of the iterations."""
        e = self.experiment
        for t in range(1, e.portions - e.data.first_portion + 2):
            yield from self.prompts(t)

    @cached_property
    def heldout_rows(self) -> PromptSet:
        """Every usable row of `data.heldout`, with a record of the rows that were left out."""
        if self.experiment.data.heldout is None:
            return PromptSet(())
        return self._read("heldout", pairs=not self.task.answers)

    @cached_property
    def heldout(self) -> list[Prompt]:
        """The prompts that the policies are evaluated on."""
        rows = self.heldout_rows[: self.experiment.data.heldout_limit]
        return [self.with_system(p) for p in rows]

    @cached_property
    def of_sets(self) -> dict[str, Settings]:
        """For each of `data.heldout_sets`, the settings `data` with this set as held-out data."""
        d = self.experiment.data
        return {
            name: dataclasses.replace(
                d, heldout=each.source, heldout_split=each.split, heldout_config=each.config,
                heldout_limit=each.limit or d.heldout_limit, heldout_sets={},
            )
            for name, each in d.heldout_sets.items()
        }  # fmt: skip

    @cached_property
    def set_rows(self) -> dict[str, PromptSet]:
        """Every usable row of each named held-out set."""
        pairs = not self.task.answers
        return {name: self._read("heldout", pairs, d) for name, d in self.of_sets.items()}

    @cached_property
    def heldout_sets(self) -> dict[str, list[Prompt]]:
        """The prompts of each named held-out set."""
        limits = {name: d.heldout_limit for name, d in self.of_sets.items()}
        return {
            name: [self.with_system(p) for p in rows[: limits[name]]]
            for name, rows in self.set_rows.items()
        }

    @cached_property
    def loaded_tasks(self) -> Any:
        """The lm-eval tasks of the capability guard with their data, as `guard.Tasks`.

        Raises:
          EvaluationError: lm-eval is not installed, a task is unknown, or its data are missing.
        """
        from selm_jax.evaluation.benchmarks.lm_eval import guard

        return guard.load(self.experiment.evaluation, self.experiment.seed)

    def tasks(self, first: StoredTable | None) -> LazyTasks | None:
        """The tasks as an input of a stage; None if the experiment names none.

        Args:
          first: the start model's scores; None if the start model is measured.
        """
        settings = self.experiment.evaluation
        if not settings.tasks:
            return None
        folder = None if settings.task_folder is None else Path(settings.task_folder)
        return LazyTasks(lambda: self.loaded_tasks, folder, first)

    @property
    def evaluated(self) -> list[Prompt]:
        """The prompts of `data.heldout` and of all named sets."""
        return [*self.heldout, *itertools.chain(*self.heldout_sets.values())]

    @cached_property
    def trained_too(self) -> list[Prompt]:
        """The held-out prompts that are also in the training data."""
        return trained_too(self.heldout, self.every_prompt()) if self.heldout else []

    def with_system(self, prompt: Prompt) -> Prompt:
        """The prompt with the experiment's system message, if there is one."""
        system = self.experiment.data.system
        if system is None:
            return prompt
        messages = (Message("system", system), *prompt.messages)
        return dataclasses.replace(prompt, messages=messages)

    def _read(self, part: Part, pairs: bool = True, d: Settings | None = None) -> PromptSet:
        d = d or self.experiment.data
        found = multihost.first_then_others(lambda: load_data(d, part, pairs=pairs))
        multihost.check_same(f"digest of {getattr(d, part)}", lambda: prompts_digest(found))
        if d.on_bad_row == "error" or not self.task.answers or self._model is None:
            return found  # no prompt is dropped for its length
        return self._without_long(found, part, getattr(d, part))

    def _without_long(self, found: PromptSet, part: Part, name: str) -> PromptSet:
        e = self.experiment
        limit = e.rollout.max_prompt_tokens
        kept = found.without("prompt too long", lambda p: self._length(self.with_system(p)) > limit)
        if not kept:
            raise RunError(
                f"{name}: all {len(found)} prompts are longer than rollout.max_prompt_tokens "
                f"({limit}). Raise this limit, or shorten the prompts"
            )
        if part == "heldout" or not e.candidates.dataset:
            return kept
        own = self.own_answers
        fit = kept.without("answer too long", lambda p: not own.fits(self.with_system(p)))
        if not fit:
            why = own.misfit(self.with_system(kept[0]))
            raise RunError(
                f"{name}: the answers of all {len(kept)} prompts are too long: {why}. Shorten the "
                "answers, or raise training.row_length"
            )
        return fit

    # Their lengths

    @cached_property
    def longest_prompt(self) -> int:
        """The length of the longest prompt, in tokens.

        Raises:
          RunError: it is longer than `rollout.max_prompt_tokens` and bad rows are not dropped, or
            the chat template rejects a prompt. The message names the prompt.
        """
        limit = self.experiment.rollout.max_prompt_tokens
        prompts = [*self.every_prompt(), *self.evaluated]
        lengths = of_each(self._length, prompts)
        longest = max(lengths)
        if longest > limit:
            name = prompts[lengths.index(longest)].id
            long = sum(length > limit for length in lengths)
            raise RunError(
                f"prompt {name} has {longest} tokens, but rollout.max_prompt_tokens is {limit} "
                f"({long} of {len(prompts)} prompts are longer). Raise the limit, shorten "
                "the prompts, or set data.on_bad_row to 'drop' to leave out and count such rows"
            )
        return longest

    @cached_property
    def sizes(self) -> Sizes:
        """The sequence lengths for which the run's programs are built.

        Sequences that are longer than the model's context are rejected when examples are made.
        """
        longest_prompt = self.longest_prompt if self.task.answers else 0
        return self.task.sizes(
            self.experiment, self.model.facts, longest_prompt, self._longest_answered
        )

    def _longest_answered(self) -> int:
        """The length of the longest conversation in the data, with its answer, in tokens."""
        answers = self.task.answers
        prompts = [*self.every_prompt(), *(() if answers else self.evaluated)]
        return longest_answered(self.chat, prompts, whole=not answers)

    @cached_property
    def own_answers(self) -> OwnAnswers:
        """The layout and the length limits that apply to the data set's own answers."""
        e, facts = self.experiment, self.model.facts
        alone = e.taught and not e.data.rejected
        return OwnAnswers(
            self.chat, e.text, ("chosen",) if alone else ("chosen", "rejected"),
            facts.head, facts.max_positions, fixed_length(e.training.row_length),
        )  # fmt: skip

    def misfit(self, prompt: Prompt) -> str | None:
        """The reason why the data's answers to a prompt are too long; None if they fit.

        This method also measures the prompt, which makes `longest_prompt` cheaper later.
        """
        limit = self.experiment.rollout.max_prompt_tokens
        if self.task.answers and self._length(prompt) > limit:
            return None  # `longest_prompt` reports it
        return self.own_answers.misfit(prompt)

    def _length(self, prompt: Prompt) -> int:
        if (known := self._lengths.get(prompt.messages)) is None:
            known = self._lengths[prompt.messages] = len(prompt_ids(self.chat, prompt))
        return known

    @cached_property
    def _lengths(self) -> dict[tuple[Message, ...], int]:
        """Prompt lengths in tokens, cached because a large data set takes a minute to measure."""
        return {}
