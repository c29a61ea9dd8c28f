"""Finds out what generation needs in memory, from the abstract arrays of its own programs."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from selm_jax.config import Mixture
from selm_jax.config.kinds import AttentionBackEnd
from selm_jax.models.attention import holds_all_scores
from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import Decoder, parameter_count
from selm_jax.policy.sizes import Generation
from selm_jax.rollout import mixtures
from selm_jax.rollout.sampling import Sampling
from selm_jax.rollout.schedule import bucket, capacities
from selm_jax.rollout.slots import Setup, empty, slot_places
from selm_jax.shell.memory import shard_bytes


def generation(
    config: DecoderConfig,
    dtype: Any,
    mesh: Mesh,
    *,
    prompt: int,
    new_tokens: int,
    wanted: Sequence[int],
    each: int,
    attention: AttentionBackEnd = "auto",
    beside: int = 0,
    mixture: Mixture | None = None,
) -> Generation:
    """The bytes that slots, prefill rows and weights take on a device of `mesh`.

    Args:
      dtype: the compute dtype.
      mesh: the mesh to decode on.
      prompt, new_tokens: the most tokens of a prompt and of an answer.
      wanted: the number of answers of each call of the engine.
      each: the number of answers to a prompt.
      beside: the bytes on a device of what else stays in memory.
      mixture: the mixture of two policies that answers are drawn from.
    """
    c, models, itemsize = config, mixtures.models(mixture), jnp.dtype(dtype).itemsize
    one = Setup.fitted(  # a slot for each copy of the model
        decoder=Decoder(c, dtype, scan=False), sampling=Sampling(), slots=1, prefill_rows=1,
        max_prompt=prompt, max_new_tokens=new_tokens, stop_ids=(), mesh=mesh, mixture=mixture,
    )  # fmt: skip
    capacity, padded, copies = capacities(prompt, new_tokens)[-1], bucket(prompt), one.copies
    slots = jax.eval_shape(partial(empty, one, capacity))
    slot = shard_bytes(jax.tree.map(_placed, slots, slot_places(one, slots)))
    # A prefill holds the scores of one layer, its activations, and the logits of the last tokens.
    platform = mesh.devices.flat[0].platform
    scores = 3 * 4 * c.heads * padded * holds_all_scores(attention, padded, platform)
    layer = padded * (scores + (8 * c.embed + 3 * c.mlp) * itemsize)
    row = one.groups * slot * padded // capacity + layer + 4 * 4 * models * c.vocab_size
    weights = parameter_count(c) * itemsize
    # XLA keeps up to three caches while it decodes, and two around the kernel of TPUs, which reads
    # the cache where it lies if no dimension has to be padded. A step holds a few arrays of logits.
    in_place = platform == "tpu" and attention in ("auto", "kernel") and c.head_dim % 128 == 0
    return Generation(
        wanted, max(each, 1), copies, padded, models * weights // (mesh.size // copies) + beside,
        slot=slot + 2 * 4 * models * c.vocab_size, row=row, caches=2 if in_place else 3,
    )  # fmt: skip


def _placed(x: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
