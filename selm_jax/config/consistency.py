"""Finds contradictions between groups of settings that are valid separately."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from selm_jax.config.heldout import bad_metric
from selm_jax.config.settings import Experiment
from selm_jax.shell.user_code import UserCodeError, check_name, is_user_code


def inconsistencies(e: Experiment) -> Iterator[str]:
    """Yields contradictions between groups of an experiment's settings, as `key: problem`."""
    rates = len(e.training.learning_rate)
    if rates not in (1, e.iterations):
        yield (
            f"training.learning_rate: {rates} values for {e.iterations} iterations; give one value "
            "for all, or one per iteration"
        )
    alpha = e.objective.get("alpha")
    if isinstance(alpha, list) and len(alpha) not in (1, e.iterations):
        yield (
            f"objective.alpha: {len(alpha)} values for {e.iterations} iterations; give one value "
            "for all, or one per iteration"
        )
    if e.iterations > e.portions - e.data.first_portion + 1:
        yield (
            f"data.portions: {e.portions} portions are too few for {e.iterations} iterations that "
            f"start at data.first_portion: {e.data.first_portion}. Raise data.portions, or lower "
            "iterations"
        )
    yield from _bad_names(e)
    if e.taught:
        if e.text.layout == "paper" and not e.data.rejected:
            yield "text.layout: paper needs pairs; name the column data.rejected, or use default"
    elif e.candidates.dataset and not (e.data.chosen and e.data.rejected):
        yield (
            "candidates.dataset: it makes the data set's answers candidates, but data.chosen and "
            "data.rejected do not name their columns. If the data has only prompts, set "
            "candidates.dataset: false and candidates.samples. To train on the data set's answers "
            "(loss: sft), name data.chosen alone and set candidates.greedy: 0"
        )
    budget, batch = e.feedback.budget, e.training.global_batch
    if budget is not None and budget < batch and not e.taught:
        yield (
            f"feedback.budget: {budget:,} prompts per iteration give at most {budget:,} pairs, "
            f"fewer than one batch of training.global_batch = {batch:,}. Raise the budget, or "
            "lower training.global_batch"
        )
    asks_for_scores = "bradley_terry" in str(e.objective.get("loss")) and e.objective.get("margin")
    if asks_for_scores and not e.data.chosen_score:
        yield (
            "objective.margin: the margin needs the scores of the data; name their columns in "
            "data.chosen_score and data.rejected_score"
        )
    if e.keep_best is not None:
        if e.data.heldout is None:
            yield "keep_best: it needs held-out data; set data.heldout, or set keep_best: null"
        elif (problem := bad_metric(e.keep_best, e.data.heldout_sets)) is not None:
            yield f"keep_best: {problem}"
    if e.evaluation.tasks and e.data.heldout is None:
        yield "evaluation.tasks: they are measured with the held-out data; set data.heldout as well"
    if e.training.router == "trained" and e.lora is not None:
        yield (
            "training.router: trained; with lora only the adapters are trained, and routers have "
            "none. Set training.router: frozen, or set lora: null"
        )
    yield from _of_sampled_answers(e)
    count = e.candidates.greedy + e.candidates.samples + 2 * e.candidates.dataset
    if count < 2 and not e.taught:
        yield f"candidates: {count} in all; a pair needs at least 2"


def _of_sampled_answers(e: Experiment) -> Iterator[str]:
    """Yields settings of importance weights and mixtures that do not fit the sampler."""
    if e.training.importance is not None:
        if not e.candidates.greedy + e.candidates.samples:
            yield (
                "training.importance: it weights the policy's own answers, and candidates.greedy "
                "and candidates.samples ask for none. Ask for some, or set it to null"
            )
        if e.text.layout == "paper":
            yield (
                "training.importance: text.layout: paper trains on other token ids than were "
                "sampled, so there are no ratios. Use the default layout, or set it to null"
            )
        remote, temperature = e.rollout.remote, e.rollout.temperature
        tempered = remote is not None and remote.engine == "sglang" and temperature != 1
        if e.candidates.samples and tempered:
            yield (
                "training.importance: it needs log-probabilities at temperature 1, but SGLang "
                f"reports them after rollout.temperature: {temperature:g}. Set "
                "rollout.temperature: 1, or rollout.remote.engine: vllm with a vLLM server, or set "
                "training.importance: null"
            )
    if e.rollout.mixture is not None and not e.candidates.samples:
        yield (
            "rollout.mixture: it changes sampled answers only, and candidates.samples is 0. Ask "
            "for some, or set rollout.mixture: null"
        )


def _bad_names(e: Experiment) -> Iterator[str]:
    """Yields malformed names of the user's own functions, without importing any module."""
    for key, name in user_code_in(e):
        try:
            check_name(name)
        except UserCodeError as error:
            yield f"{key}: {name!r}: {error}"


def user_code_in(e: Experiment) -> Iterator[tuple[str, str]]:
    """Yields the user's own functions that an experiment names, as (dotted key, name)."""
    terms = str(e.objective.get("loss")).split("+")
    # A term may have a weight, as in "dpo+0.2*sft".
    named: list[tuple[str, Any]] = [
        ("objective.loss", term.rpartition("*")[2].strip()) for term in terms
    ]
    named += [("rollout.filter", e.rollout.filter)]
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
