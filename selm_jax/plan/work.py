"""Estimates how much an iteration computes, and how long this takes on given devices.

FLOPs are counted from the model's facts (`models.flops`), because XLA's own count includes the body
of a loop only once, and the layers are a loop. Passes over whole sequences are assumed to reach a
fraction of the peak (`mfu`). Decoding a token reads all weights and the caches of all slots, so the
memory (`mbu` of its bandwidth) sets the time unless the arithmetic takes longer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

from selm_jax.models import flops
from selm_jax.models.config import DecoderConfig
from selm_jax.plan.phases import Blueprint
from selm_jax.plan.rankers import is_relative
from selm_jax.preferences.batches import updates_per_epoch
from selm_jax.preferences.examples import Example
from selm_jax.preferences.layouts import least_padding
from selm_jax.rollout import mixtures
from selm_jax.rollout.engine import bucket
from selm_jax.shell.memory import shard_bytes
from selm_jax.text.prompts import rows_of


@dataclasses.dataclass(frozen=True)
class Lengths:
    """The sizes of the data, which are measured, set by options, or assumed.

    Attributes:
      prompts: number of prompts of one iteration; None if unknown.
      heldout: number of prompts of one evaluation; 0 without evaluation, None if unknown.
      pairs: how many held-out prompts have a chosen and a rejected answer, which are scored too.
      prompt, response: mean number of tokens.
      assumed: the assumptions, in words: values that are only bounds from the settings.
    """

    prompts: int | None
    heldout: int | None
    pairs: int
    prompt: int
    response: int
    assumed: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Assumed:
    """The assumed fractions of the chip's peak FLOP/s (mfu) and memory bandwidth (mbu).

    MFU is defined in PaLM (arXiv 2204.02311, appendix B).
    """

    mfu: float
    mbu: float


@dataclasses.dataclass(frozen=True)
class Part:
    """A stage of an iteration: the tokens it processes, its FLOPs, its hours (None if unknown)."""

    name: str
    tokens: int
    flop: float
    hours: float | None


@dataclasses.dataclass(frozen=True)
class Work:
    """The work of one iteration.

    Attributes:
      examples: number of training examples.
      updates: number of updates; batches: packed batches of each update.
      rows, row_length: rows of a batch, and tokens of a row.
      useful, padded: tokens of an iteration's batches, without and with padding.
      start: the evaluation of the start model, before the first iteration.
      second: the scoring by a second reference, which is in `parts` but not in the first iteration,
        where both references are the start model.
    """

    examples: int
    updates: int
    batches: int
    rows: int
    row_length: int
    useful: int
    padded: int
    parts: tuple[Part, ...]
    start: Part | None = None
    second: Part | None = None

    @property
    def flop(self) -> float:
        return sum(part.flop for part in self.parts)

    @property
    def hours(self) -> float | None:
        hours = [part.hours for part in self.parts if part.hours is not None]
        return sum(hours) if len(hours) == len(self.parts) else None

    def hours_of_run(self, iterations: int) -> float | None:
        """The hours of a whole run, with the evaluation of the start model; None if unknown."""
        if self.hours is None:
            return None
        before = 0 if self.start is None else self.start.hours or 0
        spared = 0 if self.second is None else self.second.hours or 0
        return self.hours * iterations + before - spared


def lengths_of(
    b: Blueprint, rows: int | None, heldout: int | None, prompt: int | None, response: int | None
) -> Lengths:
    """Finds the sizes of the data from options, else local data, else limits in the settings.

    Args:
      rows, heldout: number of rows of the training and the held-out data.
      prompt, response: mean number of tokens.
    """
    e, assumed = b.experiment, []
    prompts = None
    if rows is not None:
        prompts = len(rows_of(range(rows), 1, e)[: e.data.limit])
    elif Path(e.data.train).exists():
        prompts = len(b.data.prompts(1))
    else:
        assumed.append(f"{e.data.train} is not on this machine: give its rows with --data-rows")
    if e.data.heldout is None:
        heldout = 0
    elif heldout is None:
        heldout = len(b.data.heldout) if Path(e.data.heldout).exists() else e.data.heldout_limit
        if heldout is None:
            assumed.append(
                f"{e.data.heldout} is not on this machine, so evaluation is not counted: give its "
                "rows with --heldout-rows"
            )
    elif e.data.heldout_limit is not None:
        heldout = min(heldout, e.data.heldout_limit)
    pairs = heldout or 0
    if heldout and Path(str(e.data.heldout)).exists():
        local = b.data.heldout
        pairs = heldout * sum(None not in (p.chosen, p.rejected) for p in local) // len(local)
    elif heldout and (e.data.chosen, e.data.rejected) != ("chosen", "rejected"):
        pairs = 0  # held-out pairs are only read from columns with these names
    for name, each in b.data.of_sets.items():
        if Path(str(each.heldout)).exists():
            heldout = (heldout or 0) + len(b.data.heldout_sets[name])
        else:
            assumed.append(
                f"{each.heldout} is not on this machine, so its evaluation is not counted"
            )
    if e.evaluation.tasks:
        assumed.append(
            "the tasks of evaluation.tasks are not counted; `selm eval lm_eval MODEL --tasks "
            f"{','.join(e.evaluation.tasks)} --dry-run` counts their tokens"
        )
    if prompt is None:
        prompt = b.lengths.longest_prompt
        assumed.append(
            f"every prompt has {prompt:,} tokens, the maximum; --prompt-tokens sets the mean"
        )
    if response is None:
        response = e.rollout.max_new_tokens
        assumed.append(
            f"every answer has {response:,} tokens, the maximum; --response-tokens sets the mean"
        )
    if e.training.row_length == "auto":
        assumed += _of_rows(b)
    if e.rollout.remote is not None:
        assumed.append("rollout.remote generates the candidates; its time is not counted")
    return Lengths(prompts, heldout, pairs, prompt, response, tuple(assumed))


def _of_rows(b: Blueprint) -> Iterator[str]:
    """Says in words what is assumed about rows whose length is `auto`."""
    e = b.experiment
    if e.candidates.dataset and e.text.layout != "paper":
        yield (
            f"the data's answers have at most {e.rollout.max_new_tokens:,} tokens "
            "(rollout.max_new_tokens)"
        )
    yield (
        f"training.row_length is auto, so memory is for rows of {b.row_lengths[-1]:,} tokens, "
        "twice the longest example. Hours are for examples that all have the mean length; real "
        "ones leave more padding, which `selm preview` counts"
    )


@dataclasses.dataclass(frozen=True)
class Packed:
    """How the examples of an update are packed, if each has the mean length.

    Attributes:
      rows, time: rows of a batch, and tokens of a row.
      batches: number of batches of an update.
      per_row: number of examples in a row.
    """

    rows: int
    time: int
    batches: int
    per_row: int


def packed(b: Blueprint, of: Lengths) -> Packed:
    """Packs an update whose examples all have the mean length, as a run would."""
    t = b.experiment.training
    total, _ = _example(b, of)
    rows, time = b.programs.batches.rows, b.row_lengths[0]
    if t.row_length == "auto":
        answer = max(total - 1, 1)
        update = [Example("mean", (0,), ((0,) * answer,), {})] * t.global_batch
        rows, time = least_padding([update], b.row_lengths, rows=rows, ways=b.devices.row_ways)
    per_row = max(1, time // total)
    return Packed(rows, time, math.ceil(math.ceil(t.global_batch / per_row) / rows), per_row)


def _example(b: Blueprint, of: Lengths) -> tuple[int, int]:
    """The number of tokens of an example, and how many of them are scored."""
    e, distinct = b.experiment, b.responses
    prompt, response = of.prompt, of.response
    if e.text.layout == "paper":
        prompt = min(prompt, e.text.max_prompt_length)
        response = min(response, e.text.max_length - prompt)
    scored, longest = distinct * response, b.row_lengths[0]
    return min(prompt + scored, longest), min(scored, longest)


def _heldout_rows(b: Blueprint, of: Lengths, time: int) -> tuple[int, int]:
    """The number of packed rows in an evaluation, and the most scored tokens in a row.

    Rows that fill up the last batch are included. Held-out prompts are never cut: if the answers to
    a prompt do not fit in one row together, each gets a row of its own
    (`evaluation.measuring.in_rows`). An assumed length beyond a row counts as a whole row, although
    the stage would leave that answer out.
    """
    e, size = b.experiment, b.programs.batches.rows
    answers, heldout = 1 + e.evaluation.samples, of.heldout or 0
    kinds = [(of.pairs, 2)]  # number of examples, and of responses in each
    if b.task.answers:
        fit = of.prompt + answers * of.response <= time
        kinds.append((heldout, answers) if fit else (heldout * answers, 1))
    rows, most = 0, 0
    for examples, responses in kinds:
        length = of.prompt + responses * of.response
        per_row = max(1, time // max(length, 1))
        rows += math.ceil(examples / per_row)
        if examples:
            most = max(most, min(per_row * responses * of.response, time))
    return size * math.ceil(rows / size), most


def work_of(b: Blueprint, of: Lengths, assumed: Assumed) -> Work | None:
    """Estimates the work of one iteration; None if its number of prompts is unknown."""
    if of.prompts is None:
        return None
    e, t, target = b.experiment, b.experiment.training, b.target
    config, devices = b.programs.config, len(target.devices)
    total, scored = _example(b, of)
    pack = packed(b, of)
    time, per_row = pack.time, pack.per_row

    def passes(name: str, tokens: int, flop: float, on: int = devices) -> Part:
        rate = target.peak and target.peak * on * assumed.mfu
        return Part(name, tokens, flop, flop / rate / 3600 if rate else None)

    def forward(rows: int, time: int, scored: int) -> float:
        return flops.forward(config, rows=rows, time=time, keys=time, scored=scored).total

    def generation(name: str, prompts: int, each: int, models: int = 1) -> list[Part]:
        if not prompts * each:
            return []
        time = bucket(of.prompt)
        prefill = passes(f"{name}: prefill", prompts * time, models * forward(prompts, time, 1))
        return [prefill, _decoding(b, of, f"{name}: decode", prompts * each, assumed, models)]

    def ranking(name: str, prompts: int, candidates: int) -> list[Part]:
        found = []
        for ranker in b.model_rankers if prompts * candidates else ():
            tokens, flop = ranker.read(of.prompt, of.response, candidates)
            found.append(passes(name, prompts * tokens, prompts * flop, ranker.devices))
        return found

    # The number of scored tokens of a row, rounded as in `packing.common_shape`.
    step = max(time // 8, 1)
    scored = min(math.ceil(per_row * scored / step) * step, time)

    def scoring(name: str, examples: int) -> list[Part]:
        size = b.programs.batches.rows
        rows = size * math.ceil(math.ceil(examples / per_row) / size)
        flop = forward(rows, time, scored)
        return [passes(name, rows * time, flop)] if examples else []

    c = e.candidates
    each, candidates = c.greedy + c.samples, c.greedy + c.samples + 2 * c.dataset
    examples = of.prompts if e.feedback.budget is None else min(of.prompts, e.feedback.budget)
    updates = updates_per_epoch(examples, t.global_batch) * t.epochs
    rows = updates * pack.batches * pack.rows
    train = _training(config, t.reference == "live", rows, time, scored)
    here = e.rollout.remote is None
    models = mixtures.models(e.rollout.mixture)
    parts = generation("generate", of.prompts, each, models) if here else []
    parts += ranking("rank", examples, 0 if e.taught else candidates)
    if not b.task.reference_free:
        parts += scoring("score", examples)
    two = b.task.start_share and e.iterations > 1  # INPO: the start model and the policy before
    second = scoring("score: start model", examples) if two else []
    parts += [*second, passes("train", rows * time, train)]

    def evaluation(models: int) -> Part | None:
        """Estimates the work of `stages.evaluate` if `models` models score the held-out answers:
        the policy and, if it differs, the start model. A reward model only scores pairs."""
        heldout, answers, found = of.heldout or 0, 1 + e.evaluation.samples, []
        if b.task.answers:
            found += generation("evaluate", heldout, answers)
            if is_relative(e.feedback):
                found += ranking("evaluate", heldout * answers, 2)
            else:
                found += ranking("evaluate", heldout, answers)
        rows, of_row = _heldout_rows(b, of, time)
        of_row = min(math.ceil(of_row / step) * step, time)
        if rows:
            tokens, flop = rows * time, forward(rows, time, of_row)
            found.append(passes("evaluate", models * tokens, models * flop))
        return _together("evaluate", found) if found else None

    parts += [part for part in [evaluation(2 if b.task.answers else 1)] if part is not None]
    return Work(
        examples, updates, pack.batches, pack.rows, time,
        useful=updates * t.global_batch * total, padded=rows * time, parts=tuple(parts),
        start=evaluation(1), second=second[0] if second else None,
    )  # fmt: skip


def _training(config: DecoderConfig, live: bool, rows: int, time: int, scored: int) -> float:
    """Counts the operations of the gradients, and of the passes of a `live` reference."""
    size = {"rows": rows, "time": time, "keys": time, "scored": scored}
    train = flops.forward_and_backward(config, **size).total
    return train + flops.forward(config, **size).total if live else train


def _together(name: str, parts: list[Part]) -> Part:
    hours = [p.hours for p in parts if p.hours is not None]
    return Part(
        name, sum(p.tokens for p in parts), sum(p.flop for p in parts),
        sum(hours) if len(hours) == len(parts) else None,
    )  # fmt: skip


def _decoding(
    b: Blueprint, of: Lengths, name: str, responses: int, assumed: Assumed, models: int
) -> Part:
    """Estimates the work of decoding answers token by token, each of which `models` models read.

    This assumes that all slots are always full, and that every replica of the model reads its
    weights and whole caches of the greatest capacity at every step. An engine whose responses are
    shorter reads less.
    """
    target, slots = b.target, b.programs.engine.slots
    capacity = bucket(b.programs.sizes.longest_prompt) + b.experiment.rollout.max_new_tokens
    tokens = responses * of.response
    one = flops.forward(b.programs.config, rows=tokens, time=1, keys=capacity, scored=1).total
    flop = models * one
    if not (target.peak and target.bandwidth):
        return Part(name, tokens, flop, None)
    steps = math.ceil(responses / slots) * of.response
    planned = mixtures.models(b.programs.engine.mixture)
    read = shard_bytes(b.decoding_params) + shard_bytes(b.generation.slots.cache)
    read *= models / planned
    by_memory = steps * read / (target.bandwidth * assumed.mbu)
    by_arithmetic = flop / (target.peak * len(target.devices) * assumed.mfu)
    return Part(name, tokens, flop, max(by_memory, by_arithmetic) / 3600)
