"""score: what is trained on, with the reference's log-probabilities (examples.parquet)."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np

from selm_jax.parallel import multihost
from selm_jax.preferences.examples import ROLES, Example
from selm_jax.preferences.own_answers import rated_example
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.stages.generate import Counts
from selm_jax.tables import examples as table
from selm_jax.tables import ranked
from selm_jax.text.layout import paper_row


def score(run: Run, t: int) -> Counts:
    """The reference, which is the iteration's start policy or the run's, scores every response once.

    An objective that never looks at the reference needs no scores: they are null.
    """
    examples, cut = paired_examples(run, t)
    logps: list[tuple[float, ...] | None] = [None] * len(examples)
    if examples and not run.task.reference_free:
        params = run.programs.start_of(run.reference(t))
        with run.bar(f"iteration {t}  score", len(examples), "examples") as advance:

            def progress(done: int, tokens: int) -> None:
                advance(done, tokens)
                multihost.stop_if_told()

            logps[:] = run.programs.scorer.logps(params, examples, progress)
    scored = [
        dataclasses.replace(e, reference=found) for e, found in zip(examples, logps, strict=True)
    ]
    if multihost.is_first():
        reference = artifacts.digest(run.reference(t))
        table.write(run.folder.iteration(t) / "examples.parquet", scored, reference)
    return {
        "examples": len(examples),
        "responses": sum(len(e.responses) for e in examples),
        "tokens": sum(e.tokens for e in examples),
        **cut,
    }


def paired_examples(run: Run, t: int) -> tuple[list[Example], Counts]:
    """The pairs of ranked.parquet, as token ids, a response with two roles once.

    Returns:
      the examples, and how many prompts and whose responses `text.layout: paper` has cut; of a
      reward model's pairs, how many were left out as too long (`data.on_bad_row: drop`).
    """
    prompts = {p.id: p for p in run.prompts(t)}
    text, head = run.experiment.text, run.programs.config.head
    pairs: dict[str, dict[str, ranked.Row]] = {}  # prompt id -> role -> its row
    for row in ranked.read(run.folder.iteration(t) / "ranked.parquet"):
        for role in ROLES:
            if getattr(row, role):
                pair = pairs.setdefault(row.prompt_id, {})
                several = sum(name.startswith("explore") for name in pair)
                pair[role if role not in pair else f"{role}/{several + 1}"] = row
    examples, cut = [], Counter[str]()
    for prompt_id, pair in pairs.items():
        if (prompt := prompts.get(prompt_id)) is None:
            raise RunError(
                f"{run.folder.iteration(t) / 'ranked.parquet'}: prompt {prompt_id} is not among the "
                f"{len(prompts)} of iteration {t}; the data or its settings have changed"
            )
        texts = {role: row.text for role, row in pair.items()}
        if head is not None:
            given = {role: row.score for role, row in pair.items()}
            scores = {role: None if np.isnan(score) else score for role, score in given.items()}
            examples.append(rated_example(run.chat, head, prompt, texts, scores))
            if run.experiment.data.on_bad_row == "drop" and too_long(run, examples[-1]):
                examples.pop()
                cut.update(too_long=1)
                continue
        elif text.layout == "paper":
            length = text.max_length, text.max_prompt_length
            row = paper_row(run.chat, prompt.messages, texts, *length)
            examples.append(Example.of(prompt_id, row.prompt, row.responses))
            cut.update(prompts_cut=row.prompt_cut, responses_cut=row.responses_cut)
        else:
            responses = {role: row.token_ids or () for role, row in pair.items()}
            examples.append(Example.of(prompt_id, run.data.prompt_ids(prompt), responses))
        _check_length(run, examples[-1])
    return examples, dict(cut)


def too_long(run: Run, example: Example) -> bool:
    """Whether a pair does not fit into a packed row, or an answer not into the model."""
    longest = len(example.prompt) + max(map(len, example.responses))
    row = run.experiment.training.row_length
    return example.tokens > row or longest > run.programs.config.max_positions


def _check_length(run: Run, example: Example) -> None:
    longest = len(example.prompt) + max(map(len, example.responses))
    if longest > run.programs.config.max_positions:
        raise RunError(
            f"prompt {example.prompt_id}: with its longest answer it has {longest} tokens; the "
            f"model was made for {run.programs.config.max_positions} (max_position_embeddings)"
        )
