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

from functools import partial
from typing import Any, NamedTuple, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

from selm_jax.models.config import Clamp, DecoderConfig, Mixture
from selm_jax.models.linear import weight
from selm_jax.models.lora import Lora
from selm_jax.models.mlp import ACTIVATIONS
from selm_jax.parallel.rules import row_spec

LOAD = "load"
"""The collection in which each layer leaves the experts chosen for each token, if it is mutable."""

ROUTER = ("router", "router_bias")
"""The names of a router's parameters."""


class Kernel(NamedTuple):
    """A matrix of each expert, and its bias and its adapter's A and B, if any.

    Attributes:
      w: [experts, in, out].
      bias: [experts, out].
      a: [experts, in, rank].
      b: [experts, rank, out].
    """

    w: Any
    bias: Any = None
    a: Any = None
    b: Any = None


Router = tuple[Float[Array, "embed experts"], Float[Array, " experts"] | None]
"""A router's kernel and its bias, if any."""

# The axes of the mesh over which kernels are cut: those that read the residual stream, and the one
# that writes it.
_INTO = Kernel(P("tensor", "fsdp"), P("tensor"), P("tensor", "fsdp"), P("tensor"))
_OUT = Kernel(
    P("tensor", None, "fsdp"), P("tensor", "fsdp"), P("tensor"), P("tensor", None, "fsdp")
)


class Experts(nn.Module):
    """A layer's router and experts.

    Attributes:
      config: the model's hyperparameters.
      mixture: those of its experts.
      mesh: the mesh over which rows and experts are sharded; None for one device.
      lora: the adapters of the experts; None for a model without adapters.
    """

    config: DecoderConfig
    mixture: Mixture
    mesh: Mesh | None
    lora: Lora | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "rows time embed"]) -> Float[Array, "rows time embed"]:
        c, e = self.config, self.mixture.experts
        d, f = c.embed, c.mlp
        router = weight(self, "router", ("embed", None), (d, e), d)
        bias = self._bias("router", (None,), (e,))
        kernels = (
            self._kernel("gate", x, ("embed", "expert_mlp"), (d, f)),
            self._kernel("up", x, ("embed", "expert_mlp"), (d, f)),
            self._kernel("down", x, ("expert_mlp", "embed"), (f, d)),
        )
        scale = 0.0 if self.lora is None else self.lora.scale
        computed = partial(_computed, mixture=self.mixture, activation=c.activation, scale=scale)
        mesh = self.mesh
        if mesh is not None and mesh.size > 1:
            computed = _on_mesh(partial(computed, on_mesh=True), mesh, x.shape[0])
        y, chosen = computed(x, (router, bias), *kernels)
        if self.is_mutable_collection(LOAD) and not self.is_initializing():
            self.put_variable(LOAD, "chosen", chosen)
        return y

    def _kernel(self, name: str, x: Array, axes: tuple[str, str], shape: tuple[int, int]) -> Kernel:
        """The kernel `name` of all experts in the dtype of x; `axes` and `shape` are of one."""
        e, lora = self.mixture.experts, self.lora
        w = weight(self, name, ("experts", *axes), (e, *shape), shape[0]).astype(x.dtype)
        bias = self._bias(name, ("experts", axes[1]), (e, shape[1]))
        bias = None if bias is None else bias.astype(x.dtype)
        if lora is None or not lora.adapts(f"{self.name}/{name}"):
            return Kernel(w, bias)

        def half(suffix: str, axes: tuple[str, str], shape: tuple[int, int]) -> Array:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("experts", *axes))
            key, shape_of_all = jax.random.key(0), (e, *shape)
            variable = self.variable("lora", f"{name}_{suffix}", zeros, key, shape_of_all)
            return cast(Array, variable.value).astype(x.dtype)

        into, out = shape
        a = half("a", (axes[0], "rank"), (into, lora.rank))
        return Kernel(w, bias, a, half("b", ("rank", axes[1]), (lora.rank, out)))

    def _bias(
        self, name: str, axes: tuple[str | None, ...], shape: tuple[int, ...]
    ) -> Array | None:
        if not self.mixture.biases:
            return None
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, axes)
        return cast(Array, self.param(f"{name}_bias", zeros, shape))


def _on_mesh(computed: Any, mesh: Mesh, rows: int) -> Any:
    """The function with each device's rows and experts; kernels arrive sharded over `fsdp` too."""
    split = row_spec(mesh, rows)
    return jax.shard_map(
        computed,
        mesh=mesh,
        in_specs=(split, P(), _INTO, _INTO, _OUT),
        out_specs=(split, split),
        check_vma=False,
    )


def _computed(
    x: Float[Array, "rows time embed"],
    router: Router,
    gate: Kernel,
    up: Kernel,
    down: Kernel,
    *,
    mixture: Mixture,
    activation: str,
    scale: float,
    on_mesh: bool = False,
) -> tuple[Float[Array, "rows time embed"], Int[Array, "rows time active"]]:
    """The weighted sum of the experts that are chosen for each token, and which these are.

    Args:
      gate, up, down: the experts' kernels, of embed x mlp, the same, and mlp x embed.
      scale: the factor of an adapter's product A B.
      on_mesh: whether this runs on each device of a mesh, which has a part of the experts.
    """
    tokens = x.reshape(-1, x.shape[-1])
    weights, chosen = route(tokens, router, mixture)
    expert = chosen.reshape(-1)
    if on_mesh:  # the experts of this device, numbered from 0
        gate, up, down = _whole(gate, _INTO), _whole(up, _INTO), _whole(down, _OUT)
        expert = expert - len(gate.w) * jax.lax.axis_index("tensor")
    here = (expert >= 0) & (expert < len(gate.w))
    expert = jnp.where(here, expert, len(gate.w))  # those of other devices come last
    order = jnp.argsort(expert)
    back = jnp.argsort(order)
    sizes = jnp.sum(expert[:, None] == jnp.arange(len(gate.w)), axis=0, dtype=jnp.int32)

    def only_here(x: Array) -> Array:
        return jnp.where(here[order][:, None], x, 0) if on_mesh else x

    def times(x: Array, kernels: Array) -> Array:
        # What is behind the last group is undefined, in a product and in its gradient.
        return only_here(jax.lax.ragged_dot(only_here(x), kernels, sizes))

    def product(x: Array, kernel: Kernel) -> Array:
        y = times(x, kernel.w)
        if kernel.bias is not None:  # as a kernel of one input, each expert's reaches its group
            y = y + times(jnp.ones((len(x), 1), x.dtype), kernel.bias[:, None])
        return y if kernel.a is None else y + scale * times(times(x, kernel.a), kernel.b)

    y = _permuted(jnp.repeat(tokens, mixture.active, axis=0), order, back)
    gates = checkpoint_name(product(y, gate), "gate")
    ups = checkpoint_name(product(y, up), "up")
    y = product(_gated(gates, ups, activation, mixture.clamp), down)
    y = _permuted(y, back, order).reshape(*chosen.shape, -1)
    y = jnp.einsum("tkd,tk->td", y, weights, preferred_element_type=jnp.float32)
    if on_mesh:
        y = jax.lax.psum(y, "tensor")
    return y.astype(x.dtype).reshape(x.shape), chosen.reshape(*x.shape[:2], -1)


def _gated(gate: Array, up: Array, activation: str, clamp: Clamp | None) -> Array:
    """Returns what goes into an expert's last kernel."""
    if clamp is None:
        return ACTIVATIONS[activation](gate) * up
    gate, up = jnp.minimum(gate, clamp.limit), jnp.clip(up, -clamp.limit, clamp.limit)
    return gate * jax.nn.sigmoid(clamp.alpha * gate) * (up + 1)


def _whole(kernel: Kernel, specs: Kernel) -> Kernel:
    """A device's experts with all their rows and columns, gathered over `fsdp`."""

    def gathered(x: Array | None, spec: P) -> Array | None:
        if x is None or "fsdp" not in spec:
            return x
        return jax.lax.all_gather(x, "fsdp", axis=spec.index("fsdp"), tiled=True)

    return Kernel(*map(gathered, kernel, specs))


def route(
    tokens: Float[Array, "tokens embed"], router: Router, mixture: Mixture
) -> tuple[Float[Array, "tokens active"], Int[Array, "tokens active"]]:
    """The weights of each token's experts, in float32, and their numbers.

    A router's scores are often close to each other, so that rounding would choose other experts.
    Hence they are computed in full float32 precision, which TPUs do not use by default.
    """
    w, bias = router
    scores = jnp.einsum(
        "td,de->te",
        tokens.astype(jnp.float32),
        w.astype(jnp.float32),
        precision=jax.lax.Precision.HIGHEST,
    )
    scores = scores if bias is None else scores + bias.astype(jnp.float32)
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
    """Counts the tokens of each expert of each layer; `weight` is 0 for padding, else 1."""
    layers = chosen.shape[0]
    weights = jnp.broadcast_to(weight[None, ..., None], chosen.shape).reshape(layers, -1)
    zeros = jnp.zeros(mixture.experts, jnp.float32)
    return jax.vmap(lambda i, w: zeros.at[i].add(w))(chosen.reshape(layers, -1), weights)


def load_metrics(counts: Float[Array, "layers experts"]) -> dict[str, Float[Array, ""]]:
    """Measures how evenly the experts are used.

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
