"""The capability guard: whether a policy still finds likely what it should be able to say.

A reward can rise while the model loses abilities that the reward does not see. So each iteration
also measures texts that training did not pick: the data's preferred held-out answers or, if the
data has none, the start model's greedy answers. The measure is their log-likelihood per token under
the policy minus that under the start model, in nats: below 0 the policy finds them less likely.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from selm_jax.objectives.roles import CHOSEN
from selm_jax.policy.policy import Policy
from selm_jax.preferences.examples import Example
from selm_jax.tables import heldout, heldout_pairs
from selm_jax.text.prompts import Prompt

Values = Float[np.ndarray, " texts"]


def of_pairs(pairs: Sequence[Example], rows: Sequence[heldout_pairs.Row]) -> Values:
    """The measure of each held-out pair's chosen answer; `rows` are the table's rows of `pairs`."""
    chosen = [row for row in rows if row.role == CHOSEN]
    tokens = [len(pair.responses[pair.roles[CHOSEN]]) for pair in pairs]
    change = [row.logp - row.logp_start for row in chosen]
    return np.array(change, np.float64) / np.array(tokens)


def of_first(policy: Policy, prompts: Sequence[Prompt], first: Sequence[heldout.Row]) -> Values:
    """The measure of each of the start model's greedy answers, without those too long for a row.

    Args:
      prompts: the held-out prompts that it answered.
      first: its rows of heldout.parquet.
    """
    ids = policy.prompt_ids([p.messages for p in prompts])
    of_prompt = dict(zip([p.id for p in prompts], ids, strict=True))
    kept = [row for row in first if row.kind == "greedy" and math.isfinite(row.logp)]
    examples = [Example(r.prompt_id, of_prompt[r.prompt_id], (r.token_ids,), {}) for r in kept]
    now = np.array([logp for (logp,) in policy.logps(examples)], np.float64)
    before = np.array([row.logp for row in kept], np.float64)
    return (now - before) / np.array([len(row.token_ids) for row in kept])


def warning(metrics: Mapping[str, float | None]) -> str | None:
    """Returns a warning if the interval of `heldout/capability` is below 0; otherwise None."""
    mean, low, high = (metrics.get(f"heldout/capability{end}") for end in ("", "_low", "_high"))
    if mean is None or low is None or high is None or high >= 0:
        return None
    return (
        f"capability guard: held-out answers are less likely than under the start model, by "
        f"{-mean:.3f} nats per token (95 % interval {-high:.3f} to {-low:.3f}). If the reward "
        "rises, look at benchmarks too (`selm eval`) before you trust it"
    )
