"""score: what is trained on, with the reference's log-probabilities (examples.parquet)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping

import numpy as np

from selm_jax.config import Experiment
from selm_jax.parallel import multihost
from selm_jax.preferences.examples import ROLES, Example
from selm_jax.preferences.own_answers import rated_example
from selm_jax.run.inputs import Model, StoredTable
from selm_jax.run.rows import RunError, prompt_ids
from selm_jax.run.task import Task
from selm_jax.stages.settings import SCORING
from selm_jax.stages.stage import Counts, stage
from selm_jax.stages.step import Step, counting
from selm_jax.tables import examples as table
from selm_jax.tables import ranked as ranked_table
from selm_jax.text.chat import Chat
from selm_jax.text.layout import paper_row
from selm_jax.text.prompts import Prompt

Pair = Mapping[str, ranked_table.Row]  # by role


def _settings(_e: Experiment, task: Task) -> tuple[str, ...]:
    of_rated = ("data.on_bad_row",) if task.rates else ()
    return ("text", "objective.rates", "objective.reference_free", *SCORING, *of_rated)


@stage(leaves=("examples.parquet",), settings=_settings)
def score(
    step: Step, prompts: list[Prompt], ranked: StoredTable, reference: Model, chat: Chat
) -> Counts:
    """The reference, which is the iteration's start policy or the run's, scores every response once.

    An objective that never looks at the reference needs no scores: they are null.
    """
    examples, cut = paired_examples(step, prompts, ranked, chat)
    logps: list[tuple[float, ...] | None] = [None] * len(examples)
    if examples and not step.task.reference_free:
        params = step.programs.start_of(reference.path)
        with step.bar(len(examples), "examples") as advance:
            logps[:] = step.programs.scorer.logps(params, examples, counting(advance))
    scored = [
        dataclasses.replace(e, reference=found) for e, found in zip(examples, logps, strict=True)
    ]
    if multihost.is_first():
        table.write(step.folder / "examples.parquet", scored, reference.digest)
    return {
        "examples": len(examples),
        "responses": sum(len(e.responses) for e in examples),
        "tokens": sum(e.tokens for e in examples),
        **cut,
    }


def paired_examples(
    step: Step, prompts: list[Prompt], ranked: StoredTable, chat: Chat
) -> tuple[list[Example], Counts]:
    """The pairs of ranked.parquet, as token ids, a response with two roles once.

    Returns:
      the examples, and how many prompts and whose responses `text.layout: paper` has cut; of a
      reward model's pairs, how many were left out as too long (`data.on_bad_row: drop`).
    """
    of_id = {p.id: p for p in prompts}
    examples, cut = [], Counter[str]()
    for prompt_id, pair in _pairs(ranked).items():
        if (prompt := of_id.get(prompt_id)) is None:
            raise RunError(
                f"{ranked.path}: prompt {prompt_id} is not among the {len(prompts)} of iteration "
                f"{step.t}; the data or its settings have changed"
            )
        example, of_example = _example(step, chat, prompt, pair)
        cut.update(of_example)
        if example is not None:
            _check_length(example, step.programs.config.max_positions)
            examples.append(example)
    return examples, dict(cut)


def _pairs(ranked: StoredTable) -> Mapping[str, Pair]:
    """The rows that play a role, by prompt and role; further explored ones as `explore/2`, ..."""
    pairs: dict[str, dict[str, ranked_table.Row]] = {}
    for row in ranked_table.read(ranked.path):
        for role in ROLES:
            if getattr(row, role):
                pair = pairs.setdefault(row.prompt_id, {})
                several = sum(name.startswith("explore") for name in pair)
                pair[role if role not in pair else f"{role}/{several + 1}"] = row
    return pairs


def _example(
    step: Step, chat: Chat, prompt: Prompt, pair: Pair
) -> tuple[Example | None, Mapping[str, int]]:
    """The example of a pair, or None if it is left out as too long; and what was cut."""
    texts, text = {role: row.text for role, row in pair.items()}, step.settings.text
    if (head := step.programs.config.head) is not None:
        given = {role: row.score for role, row in pair.items()}
        scores = {role: None if np.isnan(score) else score for role, score in given.items()}
        example = rated_example(chat, head, prompt, texts, scores)
        if step.settings.data.on_bad_row == "drop" and too_long(step, example):
            return None, {"too_long": 1}
        return example, {}
    if text.layout == "paper":
        row = paper_row(chat, prompt.messages, texts, text.max_length, text.max_prompt_length)
        cut = {"prompts_cut": row.prompt_cut, "responses_cut": row.responses_cut}
        return Example.of(prompt.id, row.prompt, row.responses), cut
    responses = {role: row.token_ids or () for role, row in pair.items()}
    return Example.of(prompt.id, prompt_ids(chat, prompt), responses), {}


def too_long(step: Step, example: Example) -> bool:
    """Whether a pair does not fit into a packed row, or an answer not into the model."""
    longest = len(example.prompt) + max(map(len, example.responses))
    row = step.settings.training.row_length
    return example.tokens > row or longest > step.programs.config.max_positions


def _check_length(example: Example, positions: int) -> None:
    longest = len(example.prompt) + max(map(len, example.responses))
    if longest > positions:
        raise RunError(
            f"prompt {example.prompt_id}: with its longest answer it has {longest} tokens; the "
            f"model was made for {positions} (max_position_embeddings)"
        )
