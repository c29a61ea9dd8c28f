"""How much an iteration computes, and how long that takes on a machine that is not here.

Floating point operations are counted from the model's facts (`models.flops`): XLA's own count takes
the body of a loop once, and the layers are a loop. Passes are taken to reach a share of the peak
(`mfu`). Decoding a token reads all weights and the caches of all slots, so its time is that of the
memory (`mbu` of the bandwidth) unless the arithmetic takes longer.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from selm_jax.models import flops
from selm_jax.plan.measure import shard_bytes
from selm_jax.plan.phases import Blueprint
from selm_jax.plan.rankers import is_relative
from selm_jax.preferences.batches import updates_per_epoch
from selm_jax.rollout.engine import bucket
from selm_jax.text.prompts import rows_of


@dataclasses.dataclass(frozen=True)
class Lengths:
    """What the data is like, or is taken to be.

    Attributes:
      prompts: of one iteration; None if the data is not here and nobody said.
      heldout: prompts of one evaluation; 0 without one, None if not known.
      pairs: how many of them come with a chosen and a rejected answer, which are scored too.
      prompt, response: mean tokens.
      assumed: in words, what of this is a bound of the settings and not known.
    """

    prompts: int | None
    heldout: int | None
    pairs: int
    prompt: int
    response: int
    assumed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Assumed:
    """Shares of what the chip could do at best. MFU as in PaLM (arXiv 2204.02311, appendix B)."""

    mfu: float
    mbu: float


@dataclasses.dataclass(frozen=True)
class Part:
    """A stage of an iteration: tokens it goes through, its arithmetic, and hours (None: unknown)."""

    name: str
    tokens: int
    flop: float
    hours: float | None


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one iteration.

    Attributes:
      examples, updates, batches: updates of an iteration, and packed batches of each.
      padded: tokens of an iteration's batches, padding included.
      start: the evaluation of the start model, before the first iteration.
    """

    examples: int
    updates: int
    batches: int
    useful: int
    padded: int
    parts: tuple[Part, ...]
    start: Part | None = None

    @property
    def flop(self) -> float:
        return sum(part.flop for part in self.parts)

    @property
    def hours(self) -> float | None:
        hours = [part.hours for part in self.parts if part.hours is not None]
        return sum(hours) if len(hours) == len(self.parts) else None


def lengths_of(
    b: Blueprint, rows: int | None, heldout: int | None, prompt: int | None, response: int | None
) -> Lengths:
    """From options where they are given, else from local data, else the settings' bounds.

    Args:
      rows, heldout: of the data sets.
      prompt, response: mean tokens.
    """
    e, assumed = b.experiment, []
    prompts = None
    if rows is not None:
        prompts = len(rows_of(range(rows), 1, e)[: e.data.limit])
    elif Path(e.data.train).exists():
        prompts = len(b.data.prompts(1))
    else:
        assumed.append(f"{e.data.train} is not here: --data-rows says how many rows it has")
    if e.data.heldout is None:
        heldout = 0
    elif heldout is None:
        heldout = len(b.data.heldout) if Path(e.data.heldout).exists() else e.data.heldout_limit
        if heldout is None:
            assumed.append(f"{e.data.heldout} is not here, evaluation not counted: --heldout-rows")
    elif e.data.heldout_limit is not None:
        heldout = min(heldout, e.data.heldout_limit)
    pairs = heldout or 0
    if heldout and Path(str(e.data.heldout)).exists():
        local = b.data.heldout
        pairs = heldout * sum(None not in (p.chosen, p.rejected) for p in local) // len(local)
    elif heldout and (e.data.chosen, e.data.rejected) != ("chosen", "rejected"):
        pairs = 0  # held-out pairs are looked for under these names
    if prompt is None:
        prompt = b.programs.sizes.longest_prompt
        assumed.append(f"every prompt has {prompt:,} tokens, the most allowed: --prompt-tokens")
    if response is None:
        response = e.rollout.max_new_tokens
        assumed.append(f"every answer has {response:,} tokens, the most allowed: --response-tokens")
    if e.rollout.remote is not None:
        assumed.append("the candidates are answers of rollout.remote, whose time is not counted")
    return Lengths(prompts, heldout, pairs, prompt, response, tuple(assumed))


def batches_of_update(b: Blueprint, of: Lengths) -> int:
    """Packed batches of an update."""
    t = b.experiment.training
    return math.ceil(math.ceil(t.global_batch / _per_row(b, of)) / t.rows)


def longest_example(b: Blueprint) -> int:
    """Tokens of the longest example that the settings allow."""
    e, distinct = b.experiment, b.responses
    if e.candidates.dataset:  # its answers are as long as they are; whoever set row_length knew
        return e.training.row_length
    return b.programs.sizes.longest_prompt + distinct * e.rollout.max_new_tokens


def _example(b: Blueprint, of: Lengths) -> tuple[int, int]:
    """Tokens of an example, and those of them that are scored."""
    e, distinct = b.experiment, b.responses
    prompt, response = of.prompt, of.response
    if e.text.layout == "paper":
        prompt = min(prompt, e.text.max_prompt_length)
        response = min(response, e.text.max_length - prompt)
    scored = distinct * response
    return min(prompt + scored, e.training.row_length), min(scored, e.training.row_length)


def _heldout_rows(b: Blueprint, of: Lengths) -> tuple[int, int]:
    """Packed rows of an evaluation, those that fill the last batch included, and the most scored
    tokens of one. Held-out prompts are never cut: answers that do not fit a row with those to the
    same prompt stand each in one of its own (`evaluation.measuring.in_rows`). Where lengths are bounds, one
    beyond a row counts as a whole row, though the stage would leave it out."""
    e, t = b.experiment, b.experiment.training
    answers, heldout = 1 + e.evaluation.samples, of.heldout or 0
    kinds = [(of.pairs, 2)]  # examples and the responses of each
    if b.task.answers:
        fit = of.prompt + answers * of.response <= t.row_length
        kinds.append((heldout, answers) if fit else (heldout * answers, 1))
    rows, most = 0, 0
    for examples, responses in kinds:
        length = of.prompt + responses * of.response
        per_row = max(1, t.row_length // max(length, 1))
        rows += math.ceil(examples / per_row)
        if examples:
            most = max(most, min(per_row * responses * of.response, t.row_length))
    return t.rows * math.ceil(rows / t.rows), most


def _per_row(b: Blueprint, of: Lengths) -> int:
    return max(1, b.experiment.training.row_length // _example(b, of)[0])


def work_of(b: Blueprint, of: Lengths, assumed: Assumed) -> Work | None:
    """One iteration; None if nobody knows how many prompts it has."""
    if of.prompts is None:
        return None
    e, t, target = b.experiment, b.experiment.training, b.target
    config, devices = b.programs.config, len(target.devices)
    total, scored = _example(b, of)
    per_row = _per_row(b, of)

    def passes(name: str, tokens: int, flop: float, on: int = devices) -> Part:
        rate = target.peak and target.peak * on * assumed.mfu
        return Part(name, tokens, flop, flop / rate / 3600 if rate else None)

    def forward(rows: int, time: int, scored: int) -> float:
        return flops.forward(config, rows=rows, time=time, keys=time, scored=scored).total

    def generation(name: str, prompts: int, each: int) -> list[Part]:
        if not prompts * each:
            return []
        time = bucket(of.prompt)
        prefill = passes(f"{name}: prefill", prompts * time, forward(prompts, time, 1))
        return [prefill, _decoding(b, of, f"{name}: decode", prompts * each, assumed)]

    def ranking(name: str, prompts: int, candidates: int) -> list[Part]:
        found = []
        for ranker in b.model_rankers if prompts * candidates else ():
            tokens, flop = ranker.read(of.prompt, of.response, candidates)
            found.append(passes(name, prompts * tokens, prompts * flop, ranker.devices))
        return found

    # Of a row so many tokens meet the unembedding (`packing.common_shape` rounds like this).
    step = max(t.row_length // 8, 1)
    scored = min(math.ceil(per_row * scored / step) * step, t.row_length)

    def scoring(name: str, examples: int) -> list[Part]:
        rows = t.rows * math.ceil(math.ceil(examples / per_row) / t.rows)
        flop = forward(rows, t.row_length, scored)
        return [passes(name, rows * t.row_length, flop)] if examples else []

    c = e.candidates
    each, candidates = c.greedy + c.samples, c.greedy + c.samples + 2 * c.dataset
    examples = of.prompts if e.feedback.budget is None else min(of.prompts, e.feedback.budget)
    updates = updates_per_epoch(examples, t.global_batch) * t.epochs
    batches = batches_of_update(b, of)
    rows = updates * batches * t.rows
    size = {"rows": rows, "time": t.row_length, "keys": t.row_length, "scored": scored}
    train = flops.forward_and_backward(config, **size).total
    if t.reference == "live":
        train += flops.forward(config, **size).total
    here = e.rollout.remote is None
    parts = generation("generate", of.prompts, each) if here else []
    parts += ranking("rank", examples, 0 if e.taught else candidates)
    if not b.task.reference_free:
        parts += scoring("score", examples)
    parts.append(passes("train", rows * t.row_length, train))

    def evaluation(models: int) -> Part | None:
        """As `stages.evaluate`; `models` score the answers: the policy, and the start model once
        they are two. A reward model scores pairs, and answers nothing."""
        heldout, answers, found = of.heldout or 0, 1 + e.evaluation.samples, []
        if b.task.answers:
            found += generation("evaluate", heldout, answers)
            if is_relative(e.feedback):
                found += ranking("evaluate", heldout * answers, 2)
            else:
                found += ranking("evaluate", heldout, answers)
        rows, of_row = _heldout_rows(b, of)
        of_row = min(math.ceil(of_row / step) * step, t.row_length)
        if rows:
            tokens, flop = rows * t.row_length, forward(rows, t.row_length, of_row)
            found.append(passes("evaluate", models * tokens, models * flop))
        return _together("evaluate", found) if found else None

    parts += [part for part in [evaluation(2 if b.task.answers else 1)] if part is not None]
    return Work(
        examples, updates, batches,
        useful=updates * t.global_batch * total, padded=rows * t.row_length, parts=tuple(parts),
        start=evaluation(1),
    )  # fmt: skip


def _together(name: str, parts: list[Part]) -> Part:
    hours = [p.hours for p in parts if p.hours is not None]
    return Part(
        name, sum(p.tokens for p in parts), sum(p.flop for p in parts),
        sum(hours) if len(hours) == len(parts) else None,
    )  # fmt: skip


def _decoding(b: Blueprint, of: Lengths, name: str, responses: int, assumed: Assumed) -> Part:
    """Answers drawn token by token. Slots are taken to be always full, and every copy of the model
    to read its weights and whole caches at every step: the mask hides entries, but spares none."""
    target, slots = b.target, b.programs.engine.slots
    capacity = bucket(b.programs.sizes.longest_prompt) + b.experiment.rollout.max_new_tokens
    tokens = responses * of.response
    flop = flops.forward(b.programs.config, rows=tokens, time=1, keys=capacity, scored=1).total
    if not (target.peak and target.bandwidth):
        return Part(name, tokens, flop, None)
    steps = math.ceil(responses / slots) * of.response
    read = shard_bytes(b.decoding_params) + shard_bytes(b.generation.slots.cache)
    by_memory = steps * read / (target.bandwidth * assumed.mbu)
    by_arithmetic = flop / (target.peak * len(target.devices) * assumed.mfu)
    return Part(name, tokens, flop, max(by_memory, by_arithmetic) / 3600)
