"""Computes a reward model's rewards of responses that are packed as prompt trees.

A reward model gives one number for a whole conversation, at its last token; where the prompt ends
does not matter. Conversations that begin alike are packed as a tree: their common beginning is
read once, as the prompt, and the rest of each is a branch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from selm_jax.models.decoder import Decoder, Params, rewards
from selm_jax.preferences.packing import PreferenceBatch

Ids: TypeAlias = tuple[int, ...]


def split(conversations: Sequence[Ids]) -> tuple[Ids, list[Ids]]:
    """Splits conversations into their common beginning and the rests, which are never empty.

    Args:
      conversations: token ids, each up to where its score is read (`ScalarHead.read`).
    """
    shortest = min(map(len, conversations)) - 1
    first = conversations[0]
    common = next(
        (n for n in range(shortest) if any(ids[n] != first[n] for ids in conversations)), shortest
    )
    return first[:common], [ids[common:] for ids in conversations]


def response_rewards(
    decoder: Decoder, params: Params, batch: PreferenceBatch
) -> Float[Array, "rows segments branches"]:
    """The reward of every response in the batch, float32; 0 where there is no response."""
    rows = batch.tokens, batch.position, batch.end
    hidden, _ = decoder.apply({"params": params}, *rows)
    return rewards_of(params, hidden, batch)


def rewards_of(
    params: Params, hidden: Float[Array, "rows time embed"], batch: PreferenceBatch
) -> Float[Array, "rows segments branches"]:
    """The same from the batch's hidden states."""
    hidden_at, there = _ends(hidden, batch)
    return jnp.where(there, rewards(params, hidden_at), 0)


def response_features(
    decoder: Decoder, params: Params, batch: PreferenceBatch
) -> Float[Array, "rows segments branches embed"]:
    """The last layer's output at each response's last token, float32; 0 where there is none."""
    rows = batch.tokens, batch.position, batch.end
    hidden, _ = decoder.apply({"params": params}, *rows)
    hidden_at, there = _ends(hidden, batch)
    return jnp.where(there[..., None], hidden_at.astype(jnp.float32), 0)


def _ends(
    hidden: Float[Array, "rows time embed"], batch: PreferenceBatch
) -> tuple[Float[Array, "rows segments branches embed"], Bool[Array, "rows segments branches"]]:
    """The hidden state at each response's last token, and which responses there are."""
    last = batch.last_of_response()
    at = jnp.maximum(last, 0).reshape(last.shape[0], -1)
    found = jnp.take_along_axis(hidden, at[..., None], axis=1)
    return found.reshape(*last.shape, -1), last >= 0
