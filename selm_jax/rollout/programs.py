"""The jitted decoding programs with abstract arguments, so that `selm plan` can compile them."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from selm_jax.rollout.schedule import bucket, capacities
from selm_jax.rollout.slots import (
    Models,
    Setup,
    Slots,
    decode,
    empty,
    insert,
    places,
    prefill,
    slot_places,
)


class Programs(NamedTuple):
    """The programs of `generate`, each a jitted function with its abstract arguments.

    `slots` is in memory during a prefill, and `prefilled` during decoding, the latter up to
    `groups` times.
    """

    prefill: tuple[Any, tuple[Any, ...]]
    insert: tuple[Any, tuple[Any, ...]]
    decode: tuple[Any, tuple[Any, ...]]
    slots: Slots
    prefilled: tuple[Any, Any]
    groups: int


def programs(engine: Setup, params: Models) -> Programs:
    """Makes the engine's programs for prompts of `max_prompt` tokens and the largest cache.

    Args:
      params: abstract parameters, as from `decoding_params`; two with a mixture.
    """

    def like(tree: Any, where: Any) -> Any:
        return jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), tree, where
        )

    def of_host(*shape: int, dtype: Any = np.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    n, rows = engine.slots, engine.prefill_rows
    largest = capacities(engine.max_prompt, engine.max_new_tokens)[-1]
    slots = jax.eval_shape(partial(empty, engine, largest))
    slots = like(slots, slot_places(engine, slots))
    prompts = (engine, params, of_host(rows, bucket(engine.max_prompt)), of_host(rows))
    cache, scores = jax.eval_shape(partial(prefill, engine), *prompts[1:])
    cache = like(cache, places(engine, cache, "slots", "kv_heads"))
    scores = like(scores, places(engine, scores, "slots"))
    flags = (of_host(n, 2, dtype=np.uint32), of_host(n, dtype=np.bool_))
    if engine.mixture is not None:
        flags += (of_host(n, dtype=np.float32),)
    return Programs(
        prefill=(prefill, prompts),
        insert=(insert, (engine, slots, cache, scores, of_host(n), of_host(n), *flags)),
        decode=(decode, (engine, params, slots, of_host(), of_host())),
        slots=slots,
        prefilled=(cache, scores),
        groups=engine.groups,
    )
