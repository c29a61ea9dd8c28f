"""What settings must be together: each may be in its range, and they still contradict each other."""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from selm_jax.config.settings import Experiment, Remote, Text
from selm_jax.shell.ranges import MOST
from selm_jax.shell.user_code import UserCodeError, check_name, is_user_code


def inconsistencies(e: Experiment) -> Iterator[str]:
    """What is wrong with the experiment as a whole, each as `key: what`."""
    rates = len(e.training.learning_rate)
    if rates not in (1, e.iterations):
        yield f"training.learning_rate: {rates} values for {e.iterations} iterations"
    if e.iterations > e.portions - e.data.first_portion + 1:
        yield (
            f"data.portions: {e.portions} portions cannot feed {e.iterations} iterations from "
            f"data.first_portion: {e.data.first_portion} on"
        )
    if e.data.system is not None and e.data.system_column not in (None, "system"):
        yield (
            f"data.system_column: {e.data.system_column} is to hold each row's system message, and "
            "data.system is one for all; set one of them"
        )
    yield from _bad_names(e)
    if e.taught:
        if e.text.layout == "paper" and not e.data.rejected:
            yield "text.layout: paper lays out pairs; data.rejected names none"
    elif e.candidates.dataset and not (e.data.chosen and e.data.rejected):
        yield (
            "candidates.dataset: the data set's answers are to compete, but data.chosen and "
            "data.rejected do not name their columns. For prompts alone set candidates.dataset: "
            "false and candidates.samples. To teach the data set's answers (loss: sft), name "
            "data.chosen alone and set candidates.greedy: 0"
        )
    if e.feedback.budget is None and e.feedback.acquisition != "random":
        yield (
            f"feedback.acquisition: {e.feedback.acquisition}; only a feedback.budget has a use for it"
        )
    budget, batch = e.feedback.budget, e.training.global_batch
    if budget is not None and budget < batch and not e.taught:
        yield (
            f"feedback.budget: {budget:,} prompts of an iteration are ranked, each of which gives one "
            f"pair at most: fewer than one batch of training.global_batch = {batch:,}. Raise the "
            "budget, or lower training.global_batch"
        )
    if e.data.rejected_score and not e.data.chosen_score:
        yield "data.rejected_score: there is no data.chosen_score to compare it with"
    asks_for_scores = "bradley_terry" in str(e.objective.get("loss")) and e.objective.get("margin")
    if asks_for_scores and not e.data.chosen_score:
        yield (
            "objective.margin: asks for gaps of the data's scores, but data.chosen_score (and "
            "data.rejected_score) name no column of them"
        )
    for key in ("max_length", "max_prompt_length"):
        if e.text.layout != "paper" and getattr(e.text, key) != getattr(Text(), key):
            yield f"text.{key}: only text.layout: paper reads it; the default layout cuts nothing"
    if e.text.max_prompt_length >= e.text.max_length:
        yield (
            f"text.max_prompt_length: {e.text.max_prompt_length}; less than text.max_length "
            f"({e.text.max_length}) was expected, or no response would be left"
        )
    count = e.candidates.greedy + e.candidates.samples + 2 * e.candidates.dataset
    if count < 2 and not e.taught:
        yield f"candidates: {count} in all; a pair needs at least 2"
    tokens = e.training.rows * e.training.row_length
    if tokens > MOST:
        yield (
            f"training.rows: {e.training.rows:,} rows of training.row_length {e.training.row_length:,} "
            f"are {tokens:,} tokens at once; at most {MOST:,} were expected"
        )
    if e.rollout.remote is not None:
        yield from _inconsistent_remote(e.rollout.remote)
    for key in ("objective", "feedback.settings", "text.template"):
        group: Any = e
        for name in key.split("."):
            group = getattr(group, name)
        yield from _not_finite(key, group)


def _not_finite(key: str, value: Any) -> Iterator[str]:
    """Numbers that are none, where what is not known here names the settings."""
    if isinstance(value, Mapping):
        for name, each in value.items():
            yield from _not_finite(f"{key}.{name}", each)
    elif isinstance(value, list):
        for i, each in enumerate(value):
            yield from _not_finite(f"{key}.{i}", each)
    elif isinstance(value, float) and not math.isfinite(value):
        yield f"{key}: {value}, a finite number was expected"


def _bad_names(e: Experiment) -> Iterator[str]:
    """Names of losses and rankers that can stand for none, known without importing anything."""
    loss = e.objective.get("loss")
    if not isinstance(loss, str):
        found = f"{loss!r} is no name" if "loss" in e.objective else "missing"
        yield f"objective.loss: {found}; it names the loss, for instance `selm` or `dpo`"
    for key, name in user_code_in(e):
        try:
            check_name(name)
        except UserCodeError as error:
            yield f"{key}: {name!r}: {error}"


def user_code_in(e: Experiment) -> Iterator[tuple[str, str]]:
    """(dotted key, name) of the functions of the user's that an experiment names."""
    terms = str(e.objective.get("loss")).split("+")
    named: list[tuple[str, Any]] = [("objective.loss", term.strip()) for term in terms]
    named += [("feedback.rule", e.feedback.rule), ("feedback.explore", e.feedback.explore)]
    todo: list[tuple[str, Any, Any]] = [("feedback", e.feedback.ranker, e.feedback.settings)]
    while todo:
        key, name, settings = todo.pop()
        named.append((f"{key}.ranker", name))
        parts = settings.get("parts") if isinstance(settings, Mapping) else None
        for n, part in enumerate(parts if isinstance(parts, list) else []):
            if isinstance(part, Mapping):
                inner = f"{key}.settings.parts.{n}"
                todo.append((inner, part.get("ranker"), part.get("settings")))
    yield from ((key, name) for key, name in named if isinstance(name, str) and is_user_code(name))


def _inconsistent_remote(r: Remote) -> Iterator[str]:
    if r.command is not None:
        try:
            parts = shlex.split(r.command)
        except ValueError as e:
            yield f"rollout.remote.command: {r.command!r}: {e}"
        else:
            if not any("{model}" in part for part in parts[1:]):
                yield (
                    f"rollout.remote.command: {r.command!r}; expected a program and {{model}} among its "
                    "arguments, for the policy's folder"
                )
