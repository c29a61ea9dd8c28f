"""Chooses the prompts that are ranked, if a budget limits their number."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from selm_jax.preferences.acquisition import DESIGNS, MODEL_BASED, Prospect, best, d_optimal, widest
from selm_jax.preferences.candidates import Candidate
from selm_jax.preferences.examples import Example
from selm_jax.preferences.selection import draws
from selm_jax.stages.ranking.candidates import Pool
from selm_jax.text.prompts import Prompt

# A model's features: returns the last layer's output at the end of every response of the examples.
Features = Callable[[Sequence[Example]], Sequence[Sequence[np.ndarray]]]
# A model that scores: returns the log-probability of every response of the examples.
Logps = Callable[[Sequence[Example]], list[tuple[float, ...]]]


def within(
    pool: Pool,
    budget: int,
    *,
    acquisition: str,
    seed: tuple[int, int],
    prompt_ids: Callable[[Prompt], tuple[int, ...]],
    policy: Logps | None,
    reference: Logps | None,
    features: Features,
) -> Pool:
    """Limits a pool to the `budget` prompts that an acquisition function chooses.

    Prompts whose candidates are all equal cannot give a pair and are never chosen.

    Args:
      budget: the largest number of prompts.
      acquisition: `feedback.acquisition`.
      seed: the experiment's seed and the iteration, which decide among prompts of equal value.
      policy: the policy that generated the candidates; None if the acquisition does not need it.
      reference: that policy's own reference. If it is None, because policy and reference are the
        same model or because the acquisition does not compare them, all reward gaps are 0.
      features: the policy's features of every response of examples; a design calls it.
    """
    able = [i for i in pool.asked if len({c.text for c in pool.candidates[i]}) > 1]
    rng = draws(seed, "the budget", 3)
    values, cost = np.zeros(len(able)), {}
    if acquisition in DESIGNS and able:
        examples, _ = _candidates(pool, able, prompt_ids)
        differences = np.array([widest(of_prompt) for of_prompt in features(examples)])
        cost = {"acquisition/forward_tokens": sum(e.tokens for e in examples)}
        chosen = d_optimal(differences, budget, rng)
    elif policy is not None and able:
        found, cost = prospects(pool, able, prompt_ids, policy, reference)
        values = np.array([MODEL_BASED[acquisition](prospect) for prospect in found])
        chosen = best(values, budget, rng)
    else:
        chosen = best(values, budget, rng)
    asked = [able[i] for i in chosen]
    cost |= {"asked": len(asked), "asked/candidates": sum(len(pool.candidates[i]) for i in asked)}
    return dataclasses.replace(pool, asked=asked, cost=cost)


def prospects(
    pool: Pool,
    which: Sequence[int],
    prompt_ids: Callable[[Prompt], tuple[int, ...]],
    policy: Logps,
    reference: Logps | None,
) -> tuple[list[Prospect], dict[str, int]]:
    """Log-probabilities of the candidates that have token ids, and the cost of computing them."""
    examples, kept = _candidates(pool, which, prompt_ids)
    of_policy = policy(examples)
    of_reference = of_policy if reference is None else reference(examples)
    found = []
    for e, each, p, r in zip(examples, kept, of_policy, of_reference, strict=True):
        at = [e.responses.index(c.token_ids) for c in each]
        drawn = np.array([c.source == "sample" for c in each])
        found.append(Prospect(np.array(p)[at], np.array(r)[at], drawn))
    passes = 1 if reference is None else 2
    return found, {"acquisition/forward_tokens": passes * sum(e.tokens for e in examples)}


def _candidates(
    pool: Pool, which: Sequence[int], prompt_ids: Callable[[Prompt], tuple[int, ...]]
) -> tuple[list[Example], list[list[Candidate]]]:
    """Each prompt's distinct answers with token ids as one example, and the candidates in it."""
    kept = [[c for c in pool.candidates[i] if c.token_ids] for i in which]
    examples = []
    for i, each in zip(which, kept, strict=True):
        ids = tuple(dict.fromkeys(c.token_ids for c in each if c.token_ids))
        prompt = pool.prompts[i]
        examples.append(Example(prompt.id, prompt_ids(prompt), ids, {}))
    return examples, kept
