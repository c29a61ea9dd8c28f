"""Compares the log-probabilities that the sampler kept with those of the trainer's scorer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from selm_jax.preferences.examples import Example
from selm_jax.rollout.gap import Gap, gap_of
from selm_jax.run.inputs import Sampled
from selm_jax.run.rows import RunError
from selm_jax.shell.words import redo
from selm_jax.stages.stage import Counts
from selm_jax.stages.step import Step
from selm_jax.tables import responses as table

OfTokens = Sequence[tuple[np.ndarray, ...]]  # of each example's responses, in order
_FEW = 256  # examples that are scored for the comparison alone


def compare(step: Step, sampled: Sampled, examples: Sequence[Example], scored: OfTokens) -> Counts:
    """Measures the gap between the sampler and the scorer, logs it, and warns or stops.

    Args:
      scored: the log-probabilities of the tokens under the reference. If the policy that answered
        is another model, `sampled.policy`, it scores the first examples here instead.

    Raises:
      RunError: the gap is above `rollout.gap.stop`.
    """
    if sampled.policy is not None:
        examples = examples[:_FEW]
        params = step.programs.start_of(sampled.policy.path)
        scored = [found for _, found in step.programs.scorer.logps_by_token(params, examples)]
    gap = gap_of(_pairs(sampled, examples, scored))
    if gap is None:
        return {}
    step.log.forget()
    step.log(gap.metrics)
    step.say(
        f"the sampler's log-probabilities differ from the scorer's by {gap.mean:.2g} nats per "
        f"token (at most {gap.largest:.2g}; K3 {gap.k3:.2g}; {gap.tokens:,} tokens)"
    )
    _judge(step, gap)
    return gap.metrics


def _pairs(
    sampled: Sampled, examples: Sequence[Example], scored: OfTokens
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields the two log-probabilities of the tokens of each answer that the policy gave."""
    wanted = {(example.prompt_id, tokens) for example in examples for tokens in example.responses}
    kept = {
        key: row.logps
        for file in table.files(sampled.responses.path)
        for row in table.read(file)
        if row.logps is not None and (key := (row.prompt_id, row.token_ids)) in wanted
    }
    for example, found in zip(examples, scored, strict=True):
        for tokens, logps in zip(example.responses, found, strict=True):
            if (of_sampler := kept.get((example.prompt_id, tokens))) is not None:
                yield np.array(of_sampler), logps


def _judge(step: Step, gap: Gap) -> None:
    limits = step.settings.rollout.gap
    if limits.stop is not None and not gap.mean <= limits.stop:
        raise RunError(
            f"iteration {step.t}: the log-probabilities of the answers' tokens are not those of "
            f"the policy. Sampler and scorer differ by {gap.mean:.3g} nats per token on average, "
            f"more than rollout.gap.stop = {limits.stop:g}. Probably the answers come from other "
            "weights, or the server reads other prompts or reports log-probabilities after "
            "temperature. Check what it serves, and generate the answers again: "
            f"{redo(step.folder, 'generate')}. To train on them nevertheless, raise "
            "rollout.gap.stop or set it to null"
        )
    if limits.warn is not None and gap.mean > limits.warn:
        step.say(
            f"Warning: this is more than rollout.gap.warn = {limits.warn:g}. Sampler and scorer "
            "may compute in different precisions or have different weights"
        )
