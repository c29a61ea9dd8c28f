"""The decoder: one Linen module for every family, used as a pure function.

    variables = Decoder(config).init(key, tokens, positions, mask)
    hidden, _ = Decoder(config).apply(variables, tokens, positions, mask)
    logits = hidden @ unembedding(variables["params"])

`hidden` and the unembedding are separate, because log-probabilities never want all logits at once.
Layers are stacked and scanned (`scan=True`, training) or one parameter tree per layer
(`scan=False`, decoding: a scan copies each layer's weights out of the stack at every step; here
that cost 1.5 times). `unstack` turns the first form of the parameters into the second.
"""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from selm_jax.models.attention import attention
from selm_jax.models.families import DecoderConfig
from selm_jax.models.linear import project
from selm_jax.models.rope import rotate, rotations

Params = dict[str, Any]

# What the backward pass finds stored; everything else it computes again.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "mlp": jax.checkpoint_policies.save_only_these_names("gate", "up"),
    "dots": jax.checkpoint_policies.save_only_these_names("qkv", "context", "gate", "up"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


@flax.struct.dataclass
class LayerCache:
    """Keys and values of the tokens seen so far.

    Heads come before tokens: that is the order in which attention reads them, and in the other one
    every decoding step would copy the whole cache into it.
    """

    keys: Float[Array, "*layers rows kv_heads capacity head_dim"]
    values: Float[Array, "*layers rows kv_heads capacity head_dim"]


def _weight(
    module: nn.Module, name: str, axes: tuple[str, ...], shape: tuple[int, ...], fan_in: int
) -> Array:
    """A parameter with the logical names of its axes, from which its place on a mesh follows."""
    init = nn.with_logical_partitioning(nn.initializers.normal(fan_in**-0.5), axes)
    return cast(Array, module.param(name, init, shape))


class Norm(nn.Module):
    """Root mean square norm, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "rows time embed"]) -> Float[Array, "rows time embed"]:
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        scale = cast(Array, self.param("scale", ones, x.shape[-1:]))
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale).astype(x.dtype)


class Attention(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x, rotation, mask, cache: LayerCache | None, index):
        c = self.config
        d, n, k, h = c.embed, c.heads, c.kv_heads, c.head_dim
        q = _weight(self, "q", ("embed", "heads", "head_dim"), (d, n, h), d)
        kv_axes = ("embed", "kv_heads", "head_dim")
        w_k = _weight(self, "k", kv_axes, (d, k, h), d)
        w_v = _weight(self, "v", kv_axes, (d, k, h), d)
        o = _weight(self, "o", ("heads", "head_dim", "embed"), (n, h, d), n * h)

        query = checkpoint_name(rotate(project(x, q), rotation), "qkv")
        keys = checkpoint_name(rotate(project(x, w_k), rotation), "qkv")
        values = checkpoint_name(project(x, w_v), "qkv")
        if cache is not None:
            cache = _write(cache, keys, values, index)
            keys, values = jnp.swapaxes(cache.keys, 1, 2), jnp.swapaxes(cache.values, 1, 2)
        context = checkpoint_name(attention(query, keys, values, mask), "context")
        return project(context, o, inputs=2), cache


def _write(
    cache: LayerCache,
    keys: Float[Array, "rows time kv_heads head_dim"],
    values: Float[Array, "rows time kv_heads head_dim"],
    index: Int[Array, " rows"],
) -> LayerCache:
    """Puts each row's new keys and values at its own index of the cache."""

    def put(old: Array, new: Array) -> Array:
        rows, time = new.shape[:2]
        if time == old.shape[2]:  # a prefill fills its cache: nothing to keep
            return jnp.swapaxes(new, 1, 2).astype(old.dtype)
        at = index[:, None] + jnp.arange(time)
        return old.at[jnp.arange(rows)[:, None], :, at].set(new.astype(old.dtype))

    return LayerCache(put(cache.keys, keys), put(cache.values, values))


class MLP(nn.Module):
    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "rows time embed"]) -> Float[Array, "rows time embed"]:
        d, f = self.config.embed, self.config.mlp
        gate = _weight(self, "gate", ("embed", "mlp"), (d, f), d)
        up = _weight(self, "up", ("embed", "mlp"), (d, f), d)
        down = _weight(self, "down", ("mlp", "embed"), (f, d), f)
        g = checkpoint_name(project(x, gate), "gate")
        u = checkpoint_name(project(x, up), "up")
        return project(jax.nn.silu(g) * u, down)


class Block(nn.Module):
    """Attention and MLP, each behind its norm, each added to the residual stream."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x, rotation, mask, cache: LayerCache | None, index):
        eps = self.config.norm_eps
        y, cache = Attention(self.config, name="attention")(
            Norm(eps, name="attention_norm")(x), rotation, mask, cache, index
        )
        x = x + y
        return x + MLP(self.config, name="mlp")(Norm(eps, name="mlp_norm")(x)), cache


class Decoder(nn.Module):
    """Tokens to hidden states.

    Attributes:
      config: the family's facts.
      dtype: of activations and matrix products; parameters stay float32 and are cast on use.
      remat: a key of `REMAT`, what to keep for the backward pass.
      scan: layers stacked and scanned, or one by one.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = True

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "rows time"],
        positions: Int[Array, "rows time"],
        mask: Bool[Array, "rows time keys"],
        cache: LayerCache | tuple[LayerCache, ...] | None = None,
        index: Int[Array, " rows"] | None = None,
    ) -> tuple[Float[Array, "rows time embed"], Any]:
        """Hidden states after the last norm, and the cache with the new tokens in it.

        Args:
          tokens, positions: ids, and their positions along their own path.
          mask: which keys each token sees; keys are the tokens themselves, or the cache's entries.
          cache: stacked over layers (`scan`) or one `LayerCache` per layer; None when training.
          index: where in the cache the first of the new tokens goes, per row.
        """
        c = self.config
        embedding = _weight(self, "embedding", ("vocab", "embed"), (c.vocab_size, c.embed), c.embed)
        x = embedding[tokens].astype(self.dtype)
        rotation = rotations(positions, c.head_dim, c.rope_theta)

        block = Block
        if self.remat != "none":
            block = nn.remat(Block, policy=REMAT[self.remat], prevent_cse=not self.scan)
        if self.scan:
            every: Any = nn.broadcast
            x, cache = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=cast(Any, (every, every, 0, every)),
                length=c.layers,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(c, name="layers")(x, rotation, mask, cast(Any, cache), index)
        else:
            written = []
            for i in range(c.layers):
                layer_cache = cache[i] if isinstance(cache, tuple) else None
                x, layer_cache = block(c, name=f"layer_{i}")(x, rotation, mask, layer_cache, index)
                written.append(layer_cache)
            cache = tuple(written) if cache is not None else None
        x = Norm(c.norm_eps, name="norm")(x)
        if not c.tied:
            # Declared here so that it belongs to the tree; used by `unembedding`.
            _weight(self, "unembedding", ("vocab", "embed"), embedding.shape, c.embed)
        return x, cache


def unembedding(params: Params) -> Float[Array, "vocab embed"]:
    """The matrix that turns hidden states into logits: `hidden @ unembedding(params).T`."""
    return params["unembedding"] if "unembedding" in params else params["embedding"]


def abstract_params(config: DecoderConfig) -> Params:
    """Shapes, dtypes and logical axes of every parameter; nothing is allocated.

    Leaves are `nn.LogicallyPartitioned` boxes around `jax.ShapeDtypeStruct`.
    """
    tokens = jnp.zeros((1, 2), jnp.int32)
    mask = jnp.ones((1, 2, 2), bool)
    init = Decoder(config).init
    return jax.eval_shape(init, jax.random.key(0), tokens, tokens, mask)["params"]


def unstack(params: Params) -> Params:
    """Parameters of the scanned decoder as those of the unrolled one."""
    rest = {k: v for k, v in params.items() if k != "layers"}
    layers = jax.tree.leaves(params["layers"])[0].shape[0]
    each = {
        f"layer_{i}": jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(layers)
    }
    return rest | each


def parameter_count(config: DecoderConfig) -> int:
    return sum(x.size for x in jax.tree.leaves(abstract_params(config)))
