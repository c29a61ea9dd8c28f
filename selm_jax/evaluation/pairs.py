"""Encodes held-out preference pairs, and computes a reward model's accuracy on them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from jaxtyping import Float

from selm_jax.preferences.examples import Example
from selm_jax.statistics import proportions
from selm_jax.tables import pairs as table
from selm_jax.text.answers import answer_ids
from selm_jax.text.chat import Chat, UnusableAnswer
from selm_jax.text.prompts import Prompt


def summarize(pairs: Sequence[table.Row]) -> dict[str, float]:
    """The held-out metrics of a reward model: its accuracy on pairs, and its rewards.

    Returns:
      `heldout/accuracy`, the share of pairs whose chosen answer has the higher reward (equal
      rewards count half), with `..._low` and `..._high`, the ends of its 95 % interval over pairs
      (`proportions`); and the means of both rewards, of their difference (`heldout/margin`), and of
      -log sigmoid of the difference (`heldout/loss`).
    """
    chosen, rejected = (_column(pairs, f"reward_{role}") for role in ("chosen", "rejected"))
    margin = chosen - rejected
    right = (1 + np.sign(margin)) / 2
    low, high = proportions.interval(right)
    return {
        "heldout/pairs": len(margin),
        "heldout/accuracy": float(right.mean()),
        "heldout/accuracy_low": low,
        "heldout/accuracy_high": high,
        "heldout/ties": int(np.sum(margin == 0)),
        "heldout/margin": float(margin.mean()),
        "heldout/reward_chosen": float(chosen.mean()),
        "heldout/reward_rejected": float(rejected.mean()),
        "heldout/loss": float(np.logaddexp(0, -margin).mean()),
    }


def _column(pairs: Sequence[table.Row], name: str) -> Float[np.ndarray, " n"]:
    return np.array([getattr(pair, name) for pair in pairs], np.float64)


def answered_pair(chat: Chat, prompt: Prompt) -> Example | None:
    """Encodes a prompt with its chosen and rejected answers; None if unusable or equal."""
    try:
        ids = {role: answer_ids(chat, prompt, role) for role in ("chosen", "rejected")}
    except UnusableAnswer:
        return None
    if ids["chosen"] == ids["rejected"]:  # they differ only in text that the template removes
        return None
    return Example.of(prompt.id, chat.prompt_ids(prompt.messages), ids)


def pairs_within(chat: Chat, prompts: Iterable[Prompt], longest: int) -> tuple[list[Example], int]:
    """Encodes the data's preference pairs as examples; also counts the pairs left out.

    A pair is left out if an answer is unusable, or if it has more than `longest` tokens with its
    prompt. Prompts without two answers do not count.
    """
    both = [p for p in prompts if p.chosen is not None and p.rejected is not None]
    pairs = [answered_pair(chat, prompt) for prompt in both]
    fit = [e for e in pairs if e is not None and e.tokens <= longest]
    return fit, len(both) - len(fit)
