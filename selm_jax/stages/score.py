"""The stage `score`: adds the reference's log-probabilities to the pairs (examples.parquet)."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np

from selm_jax.config import Experiment, fixed_length
from selm_jax.objectives.roles import ROLES
from selm_jax.parallel import multihost
from selm_jax.preferences.examples import Example
from selm_jax.run.inputs import Model, Sampled, StoredTable
from selm_jax.run.rows import RunError
from selm_jax.run.task import Pair, Task
from selm_jax.shell.words import redo
from selm_jax.stages.gap import compare, judge
from selm_jax.stages.settings import SCORING
from selm_jax.stages.stage import Counts, stage
from selm_jax.stages.step import Step, counting
from selm_jax.tables import examples as table
from selm_jax.tables import ranked as ranked_table
from selm_jax.text.chat import Chat
from selm_jax.text.prompts import Prompt


def _settings(_e: Experiment, task: Task) -> tuple[str, ...]:
    own = ("text", "objective.rates", "objective.reference_free", *task.example_settings)
    own += ("objective.start_share", "objective.uses_shared", "data.bonus")
    return (*own, "rollout.gap", "training.importance", *SCORING)


@stage(leaves=("examples.parquet",), settings=_settings, judges=judge)
def score(
    step: Step, prompts: list[Prompt], ranked: StoredTable, reference: Model, chat: Chat,
    sampled: Sampled | None = None, start: Model | None = None,
) -> Counts:  # fmt: skip
    """Computes the reference's log-probability of every response.

    The reference is the policy that the iteration starts from, or the run's start model. If the
    objective is reference-free, the log-probabilities are null.

    Args:
      sampled: the policy's answers, whose log-probabilities are compared with the sampler's.
      start: the start model, if the objective mixes its log-probabilities with the reference's.

    Raises:
      RunError: they differ by more than `rollout.gap.stop`, or `training.importance` needs them
        and they were not kept.
    """
    examples, cut = paired_examples(step, prompts, ranked, chat)
    logps: list[tuple[float, ...] | None] = [None] * len(examples)
    of_tokens: list[tuple[np.ndarray, ...]] = []
    if examples and not step.task.reference_free:
        params = step.programs.start_of(reference.path)
        with step.bar(len(examples), "examples") as advance:
            found = step.programs.scorer.logps_by_token(params, examples, counting(advance))
        logps[:], of_tokens = [each for each, _ in found], [tokens for _, tokens in found]
        del params  # the policy may be read next
    if start is not None and examples:
        logps[:] = mixed(logps, _logps(step, start, examples), step.task.start_share)
    if step.task.uses_shared:
        examples = with_shared(examples, of_tokens)
    gap, examples = compare(step, sampled, examples, of_tokens)
    scored = [
        dataclasses.replace(e, reference_logps=found)
        for e, found in zip(examples, logps, strict=True)
    ]
    if multihost.is_first():
        table.write(step.folder / "examples.parquet", scored, reference.digest)
    return {
        "examples": len(examples),
        "responses": sum(len(e.responses) for e in examples),
        "tokens": sum(e.tokens for e in examples),
        **cut,
        **gap,
    }


def with_shared(
    examples: Sequence[Example], of_tokens: Sequence[tuple[np.ndarray, ...]]
) -> list[Example]:
    """The examples with the sums over their shared lengths (LD-DPO) of the tokens' numbers.

    >>> pair = Example.of("p", (1,), {"chosen": (5, 6, 2), "rejected": (7, 2)})
    >>> tokens = np.array([-1.0, -2.0, -4.0]), np.array([-3.0, -5.0])
    >>> with_shared([pair], [tokens])[0].shared_logps
    (-3.0, -8.0)
    """
    return [
        dataclasses.replace(e, shared_logps=tuple(float(x[: e.shared].sum()) for x in tokens))
        for e, tokens in zip(examples, of_tokens, strict=True)
    ]


def mixed(
    reference: Sequence[tuple[float, ...] | None], start: Sequence[tuple[float, ...]], share: float
) -> list[tuple[float, ...]]:
    """The log-probabilities of a mixture of two references: `share` of the start model's.

    >>> mixed([(-4.0, -8.0)], [(-2.0, -4.0)], 0.25)
    [(-3.5, -7.0)]
    """
    return [
        tuple(
            share * s + (1 - share) * r for r, s in zip(of_reference or (), of_start, strict=True)
        )
        for of_reference, of_start in zip(reference, start, strict=True)
    ]


def _logps(step: Step, model: Model, examples: list[Example]) -> list[tuple[float, ...]]:
    params = step.programs.start_of(model.path)
    with step.bar(len(examples), "examples, by the start model") as advance:
        return step.programs.scorer.logps(params, examples, counting(advance))


def paired_examples(
    step: Step, prompts: list[Prompt], ranked: StoredTable, chat: Chat
) -> tuple[list[Example], Counts]:
    """The pairs of ranked.parquet as token ids; a response with two roles appears once.

    Returns:
      the examples, and counts: the prompts and responses that `text.layout: paper` has cut, and the
      pairs of a reward model that were dropped as too long (`data.on_bad_row: drop`).
    """
    of_id = {p.id: p for p in prompts}
    examples, cut = [], Counter[str]()
    for prompt_id, pair in _pairs(ranked).items():
        if (prompt := of_id.get(prompt_id)) is None:
            raise RunError(
                f"{ranked.path}: prompt {prompt_id} is not among the {len(prompts)} prompts of "
                f"iteration {step.t}: the data or its settings have changed. Change them back, or "
                f"run the iteration again: {redo(step.folder, 'generate')}"
            )
        head, text = step.programs.config.head, step.settings.text
        example, of_example = step.task.example(chat, head, text, prompt, pair)
        if step.task.leaves_out_long(step.settings) and too_long(step, example):
            cut["too_long"] += 1
            continue
        if (column := step.settings.data.bonus) is not None:
            example = dataclasses.replace(example, bonus=prompt.row[column])
        cut.update(of_example)
        _check_length(example, step.programs.config.max_positions)
        examples.append(example)
    return examples, dict(cut)


def _pairs(ranked: StoredTable) -> Mapping[str, Pair]:
    """The rows with a role, by prompt and role; further explored rows are `explore/2`, ..."""
    pairs: dict[str, dict[str, ranked_table.Row]] = {}
    for row in ranked_table.read(ranked.path):
        for role in ROLES:
            if getattr(row, role):
                pair = pairs.setdefault(row.prompt_id, {})
                several = sum(name.startswith("explore") for name in pair)
                pair[role if role not in pair else f"{role}/{several + 1}"] = row
    return pairs


def too_long(step: Step, example: Example) -> bool:
    """Returns whether a pair is too long for a packed row, or an answer too long for the model."""
    longest = len(example.prompt) + max(map(len, example.responses))
    row = fixed_length(step.settings.training.row_length)
    if row is not None and example.tokens > row:
        return True
    return longest > step.programs.config.max_positions


def _check_length(example: Example, positions: int) -> None:
    longest = len(example.prompt) + max(map(len, example.responses))
    if longest > positions:
        raise RunError(
            f"prompt {example.prompt_id} has {longest} tokens with its longest answer, but the "
            f"model reads at most {positions} (max_position_embeddings). Shorten the prompt, or "
            "lower rollout.max_new_tokens or rollout.max_prompt_tokens"
        )
