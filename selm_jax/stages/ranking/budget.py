"""Which prompts the ranker is asked about, where a budget lets it be asked about a few only."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from selm_jax.preferences.acquisition import MODEL_BASED, Prospect, best
from selm_jax.preferences.examples import Example
from selm_jax.preferences.selection import draws
from selm_jax.stages.ranking.candidates import Pool
from selm_jax.text.prompts import Prompt

# Log-probabilities of every response of examples: a model that scores.
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
) -> Pool:
    """The pool with the prompts chosen that the acquisition values most.

    Prompts that can give no pair, whatever is answered, are not asked about.

    Args:
      budget: how many prompts at most.
      acquisition: `feedback.acquisition`.
      seed: of the experiment, and the iteration: decides among prompts of equal value.
      policy: the policy that generated the candidates. It is asked only if the acquisition needs it.
      reference: that policy's own reference; None if they are the same model, or if the acquisition
        does not compare them. Then all reward gaps are 0.
    """
    able = [i for i in pool.asked if len({c.text for c in pool.candidates[i]}) > 1]
    values, cost = np.zeros(len(able)), {}
    if policy is not None and able:
        found, cost = prospects(pool, able, prompt_ids, policy, reference)
        values = np.array([MODEL_BASED[acquisition](prospect) for prospect in found])
    chosen = best(values, budget, draws(seed, "the budget", 3))
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
    """Log-probabilities of the candidates that have token ids, and what they cost."""
    kept = [[c for c in pool.candidates[i] if c.token_ids] for i in which]
    examples = []
    for i, each in zip(which, kept, strict=True):
        ids = tuple(dict.fromkeys(c.token_ids for c in each if c.token_ids))
        prompt = pool.prompts[i]
        examples.append(Example(prompt.id, prompt_ids(prompt), ids, {}))
    of_policy = policy(examples)
    of_reference = of_policy if reference is None else reference(examples)
    found = []
    for e, each, p, r in zip(examples, kept, of_policy, of_reference, strict=True):
        at = [e.responses.index(c.token_ids) for c in each]
        drawn = np.array([c.source == "sample" for c in each])
        found.append(Prospect(np.array(p)[at], np.array(r)[at], drawn))
    passes = 1 if reference is None else 2
    return found, {"acquisition/forward_tokens": passes * sum(e.tokens for e in examples)}
