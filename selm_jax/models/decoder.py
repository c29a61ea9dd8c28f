"""The decoder: one Linen module for all model families, used as a pure function.

    variables = Decoder(config).init(key, tokens, positions)
    hidden, _ = Decoder(config).apply(variables, tokens, positions, end)
    scores = logits(config, variables["params"], hidden)     # a language model
    scores = rewards(variables["params"], hidden)            # a reward model (`config.head`)

Hidden states and logits are separate, because log-probabilities never need all logits at once.
For training, layers are stacked and scanned (`scan=True`). For decoding, each layer has its own
parameter tree (`scan=False`), because a scan copies each layer's weights out of the stack at every
step, which made decoding take 1.5 times as long. `models.stacked` converts the parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int

from selm_jax.config.kinds import AttentionBackEnd
from selm_jax.models.attention import attention, soft_cap
from selm_jax.models.cache import LayerCache, write
from selm_jax.models.config import DecoderConfig
from selm_jax.models.experts import LOAD, Experts
from selm_jax.models.linear import Adapted, linear, weight
from selm_jax.models.lora import Lora, LoraError
from selm_jax.models.mlp import MLP
from selm_jax.models.quantize import dequantize
from selm_jax.models.rope import growth, rotate, rotations
from selm_jax.models.sight import Sight
from selm_jax.models.stacked import stack_names
from selm_jax.parallel.rules import keep_rows

Params = dict[str, Any]
LAYER_SCALE = "layer_scale"  # a parameter of each layer that is never trained

# Which values are stored for the backward pass; it recomputes all others.
REMAT = {
    "none": jax.checkpoint_policies.everything_saveable,
    "mlp": jax.checkpoint_policies.save_only_these_names("gate", "up"),
    "dots": jax.checkpoint_policies.save_only_these_names("qkv", "context", "gate", "up"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Norm(nn.Module):
    """RMS normalization over the last axis, computed in float32."""

    config: DecoderConfig

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch features"]:
        offset = self.config.norm_offset
        ones = nn.with_logical_partitioning(nn.initializers.constant(1 - offset), ("norm",))
        scale = cast(Array, self.param("scale", ones, x.shape[-1:]))
        y = _normed(x, self.config.norm_eps)
        return (y * (offset + scale.astype(jnp.float32))).astype(x.dtype)


def _normed(x: Float[Array, "*batch features"], eps: float) -> Float32[Array, "*batch features"]:
    """Divides by the root mean square over the last axis, in float32."""
    y = x.astype(jnp.float32)
    return y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)


class Attention(Adapted):
    attend: Callable[..., Array]

    @nn.compact
    def __call__(self, x, rotation, sight: Sight, cache: LayerCache | None, index):
        c = self.config
        d, n, k, h = c.embed, c.heads, c.kv_heads, c.head_dim
        kv_axes = ("embed", "kv_heads", "head_dim")
        query = linear(self, "q", x, ("embed", "heads", "head_dim"), (d, n, h), bias=c.qkv_bias)
        keys = values = linear(self, "k", x, kv_axes, (d, k, h), bias=c.qkv_bias)
        if not c.keys_as_values:
            values = linear(self, "v", x, kv_axes, (d, k, h), bias=c.qkv_bias)
        if c.value_norm:
            values = _normed(values, c.norm_eps).astype(values.dtype)
        values = checkpoint_name(values, "qkv")
        query, keys = self._with_norm("q_norm", query), self._with_norm("k_norm", keys)
        query = rotate(query, rotation, c.rotary_pairs)
        if c.query_growth is not None:
            query = query * growth(c.query_growth, sight.position).astype(query.dtype)
        query = checkpoint_name(query, "qkv")
        keys = checkpoint_name(rotate(keys, rotation, c.rotary_pairs), "qkv")
        if cache is not None:
            cache = write(cache, keys, values, index)
            if sight.place is not None:  # otherwise the new tokens only see each other
                keys, values = jnp.swapaxes(cache.keys, 1, 2), jnp.swapaxes(cache.values, 1, 2)
        scale = h**-0.5 if c.query_scale is None else c.query_scale
        sinks = self._sinks() if c.sinks else None
        context = self.attend(
            query, keys, values, sight, scale=scale, cap=c.attention_cap, sinks=sinks
        )
        context = checkpoint_name(context, "context")
        o_axes = ("heads", "head_dim", "embed")
        return linear(self, "o", context, o_axes, (n, h, d), inputs=2, bias=c.out_bias), cache

    def _with_norm(self, name: str, x: Float[Array, "rows time heads head_dim"]) -> Array:
        """Queries or keys after their norm, if the model has one."""
        if self.config.qk_norm is None:
            return x
        heads = x.reshape(*x.shape[:2], -1) if self.config.qk_norm == "projection" else x
        return Norm(self.config, name=name)(heads).reshape(x.shape)

    def _sinks(self) -> Float[Array, " heads"]:
        zeros = nn.with_logical_partitioning(nn.initializers.zeros, ("heads",))
        return cast(Array, self.param("sinks", zeros, (self.config.heads,)))


class Block(nn.Module):
    """One layer: attention and MLP or experts, each with its norms and a residual connection."""

    config: DecoderConfig
    lora: Lora | None
    attend: Callable[..., Array]
    mesh: Mesh | None

    @nn.compact
    def __call__(self, x, way, kind, cache: LayerCache | None, index):
        """The layer's output and its cache.

        `way` is (rotation, sight) of this layer. If `kind` is given, `way` stacks those of all
        kinds of layer, and `kind` is the index of this layer's kind.
        """
        c = self.config
        x = keep_rows(x, self.mesh) if cache is None else x

        def before(name: str, x: Array) -> Array:
            return Norm(c, name=name)(x) if c.pre_norms else x

        def behind(name: str, y: Array) -> Array:
            y = Norm(c, name=name)(y) if c.post_norms else y
            return y * jnp.asarray(c.residual_scale, y.dtype) if c.residual_scale != 1 else y

        rotation, sight = way if kind is None else jax.tree.map(lambda x: x[kind], way)
        y = before("attention_norm", x)
        layer = Attention(c, self.lora, self.attend, name="attention")
        y, cache = layer(y, rotation, sight, cache, index)
        x = x + behind("attention_post_norm", y)
        y = before("mlp_norm", x)
        if c.mixture is None:
            y = MLP(c, self.lora, name="mlp")(y)
        else:
            y = Experts(c, c.mixture, self.mesh, self.lora, name="experts")(y)
        x = x + behind("mlp_post_norm", y)
        if c.layer_scale:
            ones = nn.with_logical_partitioning(nn.initializers.ones, (None,))
            x = x * cast(Array, self.param(LAYER_SCALE, ones, (1,))).astype(x.dtype)
        return x, cache


class Cycle(nn.Module):
    """Layers of different shapes, one after the other: one step of a scan over all layers."""

    config: DecoderConfig
    lora: Lora | None
    attend: Callable[..., Array]
    mesh: Mesh | None
    block: Any  # the class of layers

    @nn.compact
    def __call__(self, x, ways, _, caches: tuple[LayerCache, ...] | None, index):
        """Returns the last layer's output and all caches; `ways` has an entry for each kind."""
        c = self.config
        make = partial(self.block, lora=self.lora, attend=self.attend, mesh=self.mesh)
        return _in_turn(make, c, stack_names(c.cycle), x, ways, caches, index)


def _in_turn(
    make: Callable[..., Block],
    config: DecoderConfig,
    names: Sequence[str],
    x: Array,
    ways: Sequence[Any],
    caches: Sequence[LayerCache] | None,
    index: Array | None,
) -> tuple[Array, tuple[LayerCache, ...] | None]:
    """Runs the first layers of a model, each a module with one of these names."""
    written = []
    for i, name in enumerate(names):
        kind = config.kinds[i]
        layer = make(config.of(kind), name=name)
        cache = None if caches is None else caches[i]
        x, cache = layer(x, ways[config.distinct_kinds.index(kind)], None, cache, index)
        written.append(cache)
    return x, None if caches is None else tuple(written)


class Decoder(nn.Module):
    """Computes hidden states from tokens.

    Attributes:
      config: the model's hyperparameters.
      dtype: data type of activations and matrix products; parameters stay float32 and are cast
        when they are used.
      remat: a key of `REMAT`: what to store for the backward pass.
      scan: whether layers are stacked and scanned, or separate.
      lora: adapters, whose variables are in the collection `lora`; None for a model without them.
      quantized: whether the layers' kernels are quantized (`models.quantize`).
      back_end: how attention is computed (`models.attention`).
      mesh: the mesh over which rows and heads are sharded; None for one device.
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = True
    lora: Lora | None = None
    quantized: bool = False
    back_end: AttentionBackEnd = "auto"
    mesh: Mesh | None = None

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "rows time"],
        positions: Int[Array, "rows time"],
        end: Int[Array, "rows time"] | None = None,
        cache: LayerCache | tuple[LayerCache, ...] | None = None,
        index: Int[Array, " rows"] | None = None,
    ) -> tuple[Float[Array, "rows time embed"], Any]:
        """Hidden states that the unembedding multiplies, and the cache with the new tokens added.

        Args:
          tokens, positions: token ids, and the position of each token along its own path.
          end: one past the last token that sees each token (`models.sight`); None if every later
            token sees it. Tokens also see the cache entries before their index; entry i has
            position i.
          cache: one `LayerCache` per layer, or stacked as the layers are (`scan`), a tuple if there
            is more than one stack; None in training. Tokens that fill the whole cache only see each
            other.
          index: for each row, the index in the cache of the first new token.
        """
        c = self.config
        embedding = weight(self, "embedding", ("vocab", "embed"), (c.vocab_size, c.embed), c.embed)
        x = embedding[tokens].astype(self.dtype) * jnp.asarray(c.embed_scale, self.dtype)
        kinds = c.distinct_kinds
        sight = _sight(positions, end, cache, index)
        windows = _windows([kind.window for kind in kinds])
        ways: Any = tuple(
            (rotations(positions, kind.rope, c.of(kind).rotated), sight._replace(window=window))
            for kind, window in zip(kinds, windows, strict=True)
        )
        attend = partial(attention, back_end=self.back_end, mesh=self.mesh)

        block = Block
        if self.quantized:  # inside rematerialization, so that dequantized kernels are not stored
            block = nn.map_variables(Block, "params", trans_in_fn=dequantize)
        if self.remat != "none":
            block = nn.remat(block, policy=REMAT[self.remat], prevent_cse=not self.scan)
        if self.scan:
            every: Any = nn.broadcast
            step, facts, own, which = block, c.of(kinds[0]), cast(Any, {}), None
            if c.cycle > 1:
                step, facts, own = Cycle, c, cast(Any, {"block": block})
            elif len(kinds) > 1:  # the layers share one program, so a layer's kind is data
                ways = jax.tree.map(lambda *each: jnp.stack(each), *ways)
                which = jnp.array([kinds.index(kind) for kind in c.kinds])
            else:
                ways = ways[0]
            x, cache = nn.scan(
                step,
                variable_axes={"params": 0, "lora": 0, LOAD: 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=cast(Any, (every, every if which is None else 0, 0, every)),
                length=c.layers // c.cycle,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )(
                facts, self.lora, attend, self.mesh, **own, name="layers"
            )(x, ways, which, cast(Any, cache), index)
        else:
            make = partial(block, lora=self.lora, attend=attend, mesh=self.mesh)
            names = [f"layer_{i}" for i in range(c.layers)]
            x, cache = _in_turn(make, c, names, x, ways, cast(Any, cache), index)
        x = Norm(c, name="norm")(x)
        if c.logit_divisor != 1 and c.head is None:  # here once, for every user of logits
            x = x / jnp.asarray(c.logit_divisor, self.dtype)
        # These parameters are only declared here; `rewards` and `unembedding` use them.
        if c.head is not None:
            zeros = nn.with_logical_partitioning(nn.initializers.zeros, (None, "embed"))
            self.param("score", zeros, (1, c.embed))
        elif not c.tied:
            weight(self, "unembedding", ("vocab", "embed"), embedding.shape, c.embed)
        return x, cache


def _sight(positions: Array, end: Array | None, cache: Any, index: Array | None) -> Sight:
    """The attention mask without windows; the arguments are those of the decoder."""
    time = positions.shape[1]
    capacity = time if cache is None else jax.tree.leaves(cache)[0].shape[-2]
    if capacity == time:
        return Sight(positions, positions, end)
    place = cast(Array, index)[:, None] + jnp.arange(time)
    return Sight(positions, jnp.arange(capacity)[None], place=place)


def _windows(windows: Sequence[int | None]) -> list[Array | None]:
    """The window of each kind of layer, as arrays that can be stacked; None if no kind has one."""
    if not any(windows):
        return [None] * len(windows)
    return [jnp.int32(jnp.iinfo(jnp.int32).max if w is None else w) for w in windows]


def unembedding(params: Params) -> Float[Array, "vocab embed"]:
    """The matrix that turns hidden states into logits."""
    if "score" in params:
        raise ValueError(
            "these are the parameters of a reward model, which has no unembedding; call `rewards`"
        )
    return params["unembedding"] if "unembedding" in params else params["embedding"]


def logits(
    config: DecoderConfig, params: Params, hidden: Float[Array, "*batch embed"]
) -> Float[Array, "*batch vocab"]:
    """Float32 logits of hidden states. For training see `objectives.logprobs`."""
    w = unembedding(params).astype(hidden.dtype)
    raw = jnp.einsum("...d,vd->...v", hidden, w, preferred_element_type=jnp.float32)
    return soft_cap(raw, config.logit_cap)


def rewards(params: Params, hidden: Float[Array, "*batch embed"]) -> Float[Array, "*batch"]:
    """The reward of each hidden state, computed by the model's head, always in float32."""
    w = params["score"][0].astype(jnp.float32)
    return jnp.einsum("...d,d->...", hidden.astype(jnp.float32), w)


def abstract_params(config: DecoderConfig) -> Params:
    """Shapes, dtypes and logical axes of all parameters, without allocating them.

    Leaves are `nn.LogicallyPartitioned` boxes around `jax.ShapeDtypeStruct`. The tree is cached, so
    do not modify it.
    """
    return _abstract(config)["params"]


def abstract_adapters(config: DecoderConfig, lora: Lora) -> Params:
    """Shapes, dtypes and logical axes of all adapters. The tree is cached; do not modify it.

    Raises:
      LoraError: if the adapters' targets match the MLP of a model that has experts, but `experts`
        is off; or if it is on for a model without experts.
    """
    if config.mixture is None and lora.experts:
        raise LoraError("lora.experts is true, but this model has no experts. Set it to false")
    of_mlp = any(map(lora.adapts, ("mlp/gate", "mlp/up", "mlp/down")))
    if config.mixture is not None and of_mlp != lora.experts:
        matches = "matches matrices of the MLP" if of_mlp else "matches no matrix of the MLP"
        raise LoraError(
            f"lora.targets is {lora.targets!r}, which {matches}. This model has "
            f"{config.mixture.experts} experts in each layer there, and lora.experts is "
            f"{str(lora.experts).lower()}. To adapt attention alone, set lora.targets: self_attn "
            "and lora.experts: false; to adapt every expert, set lora.experts: true and match "
            "mlp in lora.targets"
        )
    return _abstract(config, lora)["lora"]


@lru_cache(maxsize=16)  # a run calls this dozens of times, and tracing takes a second
def _abstract(config: DecoderConfig, lora: Lora | None = None) -> dict[str, Params]:
    tokens = jnp.zeros((1, 2), jnp.int32)
    return jax.eval_shape(Decoder(config, lora=lora).init, jax.random.key(0), tokens, tokens)


def parameter_count(config: DecoderConfig) -> int:
    return sum(x.size for x in jax.tree.leaves(abstract_params(config)))


def active_parameters(config: DecoderConfig) -> int:
    """The parameters that compute each token: all, except the experts that it is not sent to."""
    if config.mixture is None:
        return parameter_count(config)
    one = dataclasses.replace(config.mixture, experts=config.mixture.active)
    return parameter_count(dataclasses.replace(config, mixture=one))
