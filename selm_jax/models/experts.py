"""A mixture of experts in place of an MLP: a router chooses a few experts for each token.

No token is dropped and no expert has a capacity, so that a token's result does not depend on the
other tokens of the batch. The tokens are sorted by expert, each expert multiplies its own group
(`jax.lax.ragged_dot`), and the results return to their places.

On a mesh, the experts are sharded over the axis `tensor`. Every device of that axis has the same
tokens, as for attention. It computes what its own experts contribute, and one sum over the axis
adds the contributions. So tokens are never sent to other devices, and no device waits for the one
whose experts are the most wanted, except at that sum.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from selm_jax.models.config import DecoderConfig, Mixture
from selm_jax.models.linear import weight
from selm_jax.models.mlp import ACTIVATIONS

LOAD = "load"
"""The collection in which each layer leaves the experts chosen for each token, if it is mutable."""

_ROWS = ("data", "fsdp")


class Experts(nn.Module):
    """A layer's router and experts.

    Attributes:
      config: the model's hyperparameters.
      mixture: those of its experts.
      mesh: the mesh over which rows and experts are sharded; None for one device.
    """

    config: DecoderConfig
    mixture: Mixture
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x: Float[Array, "rows time embed"]) -> Float[Array, "rows time embed"]:
        c, e = self.config, self.mixture.experts
        d, f = c.embed, c.mlp
        into, out = ("experts", "embed", "expert_mlp"), ("experts", "expert_mlp", "embed")
        router = weight(self, "router", ("embed", None), (d, e), d).astype(jnp.float32)
        kernels = (
            weight(self, "gate", into, (e, d, f), d).astype(x.dtype),
            weight(self, "up", into, (e, d, f), d).astype(x.dtype),
            weight(self, "down", out, (e, f, d), f).astype(x.dtype),
        )
        computed = partial(_computed, mixture=self.mixture, activation=c.activation)
        mesh = self.mesh
        if mesh is not None and mesh.size > 1:
            computed = _on_mesh(partial(computed, on_mesh=True), mesh, x.shape[0])
        y, chosen = computed(x, router, *kernels)
        if self.is_mutable_collection(LOAD) and not self.is_initializing():
            self.put_variable(LOAD, "chosen", chosen)
        return y


def _on_mesh(computed: Any, mesh: Mesh, rows: int) -> Any:
    """The function with each device's rows and experts; kernels arrive sharded over `fsdp` too."""
    # A batch that does not fill the devices is computed whole by each of them.
    split = P(_ROWS) if rows % math.prod(mesh.shape[axis] for axis in _ROWS) == 0 else P()
    into, out = P("tensor", "fsdp"), P("tensor", None, "fsdp")
    return jax.shard_map(
        computed,
        mesh=mesh,
        in_specs=(split, P(), into, into, out),
        out_specs=(split, split),
        check_vma=False,
    )


def _computed(
    x: Float[Array, "rows time embed"],
    router: Float[Array, "embed all_experts"],
    gate: Float[Array, "experts embed mlp"],
    up: Float[Array, "experts embed mlp"],
    down: Float[Array, "experts mlp embed"],
    *,
    mixture: Mixture,
    activation: str,
    on_mesh: bool = False,
) -> tuple[Float[Array, "rows time embed"], Int[Array, "rows time active"]]:
    """The weighted sum of the experts that are chosen for each token, and which these are.

    Args:
      on_mesh: whether this runs on each device of a mesh, which has a part of the experts.
    """
    tokens = x.reshape(-1, x.shape[-1])
    weights, chosen = route(tokens, router, mixture)
    expert = chosen.reshape(-1)
    if on_mesh:  # the experts of this device, numbered from 0
        gate, up = (jax.lax.all_gather(w, "fsdp", axis=1, tiled=True) for w in (gate, up))
        down = jax.lax.all_gather(down, "fsdp", axis=2, tiled=True)
        expert = expert - gate.shape[0] * jax.lax.axis_index("tensor")
    here = (expert >= 0) & (expert < gate.shape[0])
    expert = jnp.where(here, expert, gate.shape[0])  # those of other devices come last
    order = jnp.argsort(expert)
    back = jnp.argsort(order)
    sizes = jnp.sum(expert[:, None] == jnp.arange(gate.shape[0]), axis=0, dtype=jnp.int32)

    def only_here(x: Array) -> Array:
        return jnp.where(here[order][:, None], x, 0) if on_mesh else x

    def product(x: Array, kernels: Array) -> Array:
        # What is behind the last group is undefined, in a product and in its gradient.
        return only_here(jax.lax.ragged_dot(only_here(x), kernels, sizes))

    y = _permuted(jnp.repeat(tokens, mixture.active, axis=0), order, back)
    gates = checkpoint_name(product(y, gate), "gate")
    ups = checkpoint_name(product(y, up), "up")
    y = product(ACTIVATIONS[activation](gates) * ups, down)
    y = _permuted(y, back, order).reshape(*chosen.shape, -1)
    y = jnp.einsum("tkd,tk->td", y, weights, preferred_element_type=jnp.float32)
    if on_mesh:
        y = jax.lax.psum(y, "tensor")
    return y.astype(x.dtype).reshape(x.shape), chosen.reshape(*x.shape[:2], -1)


def route(
    tokens: Float[Array, "tokens embed"], router: Float[Array, "embed experts"], mixture: Mixture
) -> tuple[Float[Array, "tokens active"], Int[Array, "tokens active"]]:
    """The weights of each token's experts, in float32, and their numbers.

    A router's scores are often close to each other, so that rounding would choose other experts.
    Hence they are computed in full float32 precision, which TPUs do not use by default.
    """
    scores = jnp.einsum(
        "td,de->te", tokens.astype(jnp.float32), router, precision=jax.lax.Precision.HIGHEST
    )
    weights, chosen = jax.lax.top_k(jax.nn.softmax(scores, axis=-1), mixture.active)
    if mixture.normalized:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, chosen


@jax.custom_vjp
def _permuted(
    x: Float[Array, "n embed"], order: Int[Array, " n"], back: Int[Array, " n"]
) -> Float[Array, "n embed"]:
    """The rows of x in another order; `back` is the inverse of `order`.

    Its gradient is the inverse permutation. JAX would derive a sum over indices, which is slow.
    """
    del back  # only the gradient needs it
    return x[order]


def _permuted_forward(x, order, back):
    return x[order], (order, back)


def _permuted_backward(kept, g):
    _, back = kept
    return g[back], None, None


_permuted.defvjp(_permuted_forward, _permuted_backward)


def expert_counts(
    chosen: Int[Array, "layers rows time active"],
    weight: Float[Array, "rows time"],
    mixture: Mixture,
) -> Float[Array, "layers experts"]:
    """How many tokens each expert of each layer computes; `weight` is 0 for padding, else 1."""
    layers = chosen.shape[0]
    weights = jnp.broadcast_to(weight[None, ..., None], chosen.shape).reshape(layers, -1)
    zeros = jnp.zeros(mixture.experts, jnp.float32)
    return jax.vmap(lambda i, w: zeros.at[i].add(w))(chosen.reshape(layers, -1), weights)


def load_metrics(counts: Float[Array, "layers experts"]) -> dict[str, Float[Array, ""]]:
    """How evenly the experts are used.

    Returns:
      experts/load_max: tokens of a layer's most used expert, relative to an even load (1); the mean
        over layers.
      experts/unused: the share of all experts that no token chose.
    """
    even = jnp.maximum(jnp.mean(counts, axis=-1), 1e-9)
    return {
        "experts/load_max": jnp.mean(jnp.max(counts, axis=-1) / even),
        "experts/unused": jnp.mean(counts == 0),
    }
