"""Compares the log-probabilities that the sampler kept with those of the trainer's scorer."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from selm_jax.preferences.examples import Example
from selm_jax.rollout.gap import gap_of
from selm_jax.rollout.importance import metrics_of, weights_of
from selm_jax.run.inputs import Sampled
from selm_jax.run.rows import RunError
from selm_jax.shell.words import redo
from selm_jax.stages.stage import Counts
from selm_jax.stages.step import Step
from selm_jax.tables import responses as table

OfTokens = Sequence[tuple[np.ndarray, ...]]  # of each example's responses, in order
_FEW = 256  # examples that are scored for the comparison alone


def compare(
    step: Step, sampled: Sampled | None, examples: Sequence[Example], scored: OfTokens
) -> tuple[Counts, Sequence[Example]]:
    """Measures the gap between the sampler and the scorer, logs it, and warns or stops.

    Args:
      scored: the log-probabilities of the tokens under the reference. If the policy that answered
        is another model, `sampled.policy`, it scores the examples here instead; only the first ones
        if they get no weights.

    Returns:
      what was measured, and the examples, with weights if `training.importance` asks for them.

    Raises:
      RunError: the gap is above `rollout.gap.stop`, or weights are wanted and the sampler has not
        kept the log-probabilities of all the policy's answers.
    """
    how = step.settings.training.importance
    if sampled is None or not examples:
        if how is not None and examples:
            raise _nothing_kept(step, "any answer")
        return {}, examples
    compared = examples
    if sampled.policy is not None:
        compared = examples if how is not None else examples[:_FEW]
        params = step.programs.start_of(sampled.policy.path)
        scored = [found for _, found in step.programs.scorer.logps_by_token(params, compared)]
    by_sampler = _kept(sampled, examples)
    # What the sampler kept and the scorer found, of each response; None: not the policy's.
    both = [
        [
            (by_sampler.get((e.prompt_id, ids)), found)
            for ids, found in zip(e.responses, of, strict=True)
        ]
        for e, of in zip(compared, scored, strict=True)
    ]
    gap = gap_of(
        (kept, found) for of in both for kept, found in of if kept is not None and len(kept)
    )
    if gap is None:
        if how is not None:
            raise _nothing_kept(step, "any answer")
        return {}, examples
    metrics = gap.metrics
    if how is not None:
        weights = [
            weights_of(
                how,
                [_differences(step, e, *pair) for pair in of_example],
                [kept is not None for kept, _ in of_example],
            )
            for e, of_example in zip(examples, both, strict=True)
        ]
        metrics |= metrics_of(weights)
        examples = [
            dataclasses.replace(e, importance=tuple(tuple(w.tolist()) for w in found.weights))
            for e, found in zip(examples, weights, strict=True)
        ]
    step.log.forget()
    step.log(metrics)
    step.say(
        f"the sampler's log-probabilities differ from the scorer's by {gap.mean:.2g} nats per "
        f"token (at most {gap.largest:.2g}; K3 {gap.k3:.2g}; {gap.tokens:,} tokens)"
    )
    judge(step, metrics)
    return metrics, examples


def _kept(
    sampled: Sampled, examples: Sequence[Example]
) -> dict[tuple[str, tuple[int, ...]], np.ndarray]:
    """Reads what the sampler kept of the policy's answers, by prompt and tokens; empty: nothing.

    The last token's is NaN if the server left out the token that ended the answer.
    """
    wanted = {(example.prompt_id, tokens) for example in examples for tokens in example.responses}
    return {
        key: np.array(() if row.logps is None else row.logps)
        for file in table.files(sampled.responses.path)
        for row in table.read(file)
        if (key := (row.prompt_id, row.token_ids)) in wanted
    }


def _differences(
    step: Step, example: Example, of_sampler: np.ndarray | None, of_scorer: np.ndarray
) -> np.ndarray:
    """The scorer's log-probabilities minus the sampler's; 0 for an answer that is not the policy's.

    It is 0 as well for an end token that the server left out.

    Raises:
      RunError: the sampler has not kept them.
    """
    if of_sampler is None:
        return np.zeros(len(of_scorer))
    if not len(of_sampler) or np.isnan(of_sampler[:-1]).any():
        raise _nothing_kept(step, f"an answer to prompt {example.prompt_id}")
    return np.where(np.isnan(of_sampler), 0.0, np.asarray(of_scorer, np.float64) - of_sampler)


def _nothing_kept(step: Step, what: str) -> RunError:
    return RunError(
        f"iteration {step.t}: training.importance needs the log-probabilities of the answers' "
        f"tokens as the sampler gave them, and they were not kept of {what}. A server must report "
        "them, and an answer of an earlier version has none. Generate the answers again: "
        f"{redo(step.folder, 'generate')}. To train without weights, set training.importance: null"
    )


def judge(step: Step, metrics: Counts) -> None:
    """Warns or stops by the limits in `rollout.gap`; does nothing if no gap was measured.

    Raises:
      RunError: the gap is above `rollout.gap.stop`.
    """
    if (mean := metrics.get("gap/mean")) is None:
        return
    limits = step.settings.rollout.gap
    if limits.stop is not None and not mean <= limits.stop:
        raise RunError(
            f"iteration {step.t}: the log-probabilities of the answers' tokens are not those of "
            f"the policy. Sampler and scorer differ by {mean:.3g} nats per token on average, "
            f"more than rollout.gap.stop = {limits.stop:g}. Probably the answers come from other "
            "weights, or the server reads other prompts or reports log-probabilities after "
            "temperature. Check what it serves, and generate the answers again: "
            f"{redo(step.folder, 'generate')}. To train on them nevertheless, raise "
            "rollout.gap.stop or set it to null"
        )
    if limits.warn is not None and mean > limits.warn:
        step.say(
            f"Warning: this is more than rollout.gap.warn = {limits.warn:g}. Sampler and scorer "
            "may compute in different precisions or have different weights"
        )
