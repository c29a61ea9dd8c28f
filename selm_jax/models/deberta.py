"""DeBERTa-v3: PairRM's backbone and head, as pure Linen modules.

The encoder has no absolute positions: a token's position affects the scores only through its
distance to every other token (He et al. 2021, arXiv 2006.03654, eq. 4; v3: arXiv 2111.09543). The
score of query i and key j is

    (q_i . k_j + q_i . K[b(i - j)] + k_j . Q[b(i - j)]) / sqrt(3 head_dim)

with K and Q the key and query projections of one table of distance embeddings, and b the bucket of
a distance: exact when near, logarithmic when far.

Both distance terms use one row of the table for each diagonal i - j. So they are computed per
diagonal, as one matrix product with the table's rows in the diagonals' order, and then shifted into
place (`slant`), which copies memory and gathers nothing. On CPU this took 0.9 times as long as the
fastest gather over buckets (256 to 1024 tokens); accelerators are good at products, not at gathers.

Letters: r rows, t tokens (queries), s tokens (keys), h head_dim, p diagonals.
"""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from selm_jax.models.config_deberta import DebertaConfig
from selm_jax.models.linear import project

Params = dict[str, Any]


def bucket(
    distance: Int[np.ndarray, "*d"], buckets: int, max_distance: int
) -> Int32[np.ndarray, "*d"]:
    """The signed bucket number of each distance, not yet clipped to the size of the table.

    Each distance up to half of `buckets` has its own bucket; beyond, buckets are logarithmic. The
    computation is in float32, like transformers' `make_log_bucket_position`: at max_distance - 1
    the quotient of the logarithms is 1, and rounding in float64 could give the next bucket.
    """
    middle = buckets // 2
    far = np.maximum(np.abs(distance), middle).astype(np.float32)
    # Both logarithms are of arrays: numpy may round the logarithm of a scalar differently.
    whole = np.log(np.full_like(far, (max_distance - 1) / middle))
    steps = np.ceil(np.log(far / np.float32(middle)) / whole * np.float32(middle - 1)) + middle
    return np.where(np.abs(distance) <= middle, distance, steps * np.sign(distance)).astype(
        np.int32
    )


def table_rows(config: DebertaConfig, distance: Int[np.ndarray, "*d"]) -> Int32[np.ndarray, "*d"]:
    """The row of the distance-embedding table for each distance i - j."""
    rows = bucket(distance, config.buckets, config.max_distance) + config.buckets
    return np.clip(rows, 0, 2 * config.buckets - 1)


def diagonals(time: int) -> Int[np.ndarray, " 2*time"]:
    """The distances i - j of the columns that `slant` reads; the last column is not used."""
    return time - 1 - np.arange(2 * time)


def slant(x: Float[Array, "*lead t p"]) -> Float[Array, "*lead t t"]:
    """Shifts each row: out[i, j] = x[i, t - 1 - i + j], for p = 2 t columns.

    In memory, the entry one row down and one column to the left is p - 1 entries ahead. So, if the
    first t - 1 entries are cut off and the rest is read in rows of p - 1, every row starts at the
    right entry.
    """
    *lead, t, p = x.shape
    flat = x.reshape(*lead, t * p)[..., t - 1 : -1]
    return flat.reshape(*lead, t, p - 1)[..., :t]


def disentangled_attention(
    query: Float[Array, "r t heads h"],
    key: Float[Array, "r t heads h"],
    value: Float[Array, "r t heads h"],
    to_query: Float[Array, "p heads h"],
    to_key: Float[Array, "p heads h"],
    real: Bool[Array, "r t"],
    heads_at_once: int = 1,
) -> Float[Array, "r t heads h"]:
    """Attention by content and distance, the softmax in float32.

    Args:
      query, key, value: of the tokens.
      to_query: the keys of the distances i - j, scored against queries, in the order of
        `diagonals`.
      to_key: the queries of the distances j - i, scored against keys, in the order of `diagonals`.
      real: which tokens are not padding. Only keys are masked; the results of padded queries are
        never used.
      heads_at_once: heads per step of a loop. With one, the scores stay in a CPU's cache, which
        halves the time. More make better use of an accelerator; each needs 20 rows t^2 bytes.
    """

    def head(q, k, v, to_q, to_k):
        dot = {"preferred_element_type": jnp.float32}
        scores = jnp.einsum("rth,rsh->rts", q, k, **dot)
        scores += slant(jnp.einsum("rth,ph->rtp", q, to_q, **dot))
        scores += jnp.swapaxes(slant(jnp.einsum("rsh,ph->rsp", k, to_k, **dot)), 1, 2)
        scores = jnp.where(real[:, None, :], scores * scale, -1e30)
        return jnp.einsum("rts,rsh->rth", jax.nn.softmax(scores).astype(v.dtype), v)

    scale = (3 * query.shape[-1]) ** -0.5
    by_head = [x.transpose(2, 0, 1, 3) for x in (query, key, value)]
    by_head += [x.transpose(1, 0, 2) for x in (to_query, to_key)]
    together = heads_at_once if heads_at_once > 1 else None
    context = jax.lax.map(lambda xs: head(*xs), by_head, batch_size=together)
    return context.transpose(1, 2, 0, 3)


def _parameter(module: nn.Module, name: str, axes: tuple[str | None, ...], shape, init) -> Array:
    """A parameter with logical axis names, which determine its sharding on a mesh."""
    return cast(Array, module.param(name, nn.with_logical_partitioning(init, axes), shape))


class LayerNorm(nn.Module):
    """Layer normalization over the last axis with scale and bias, computed in float32."""

    eps: float
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "*lead embed"]) -> Float[Array, "*lead embed"]:
        size = x.shape[-1:]
        scale = _parameter(self, "scale", ("norm",), size, nn.initializers.ones)
        bias = _parameter(self, "bias", ("norm",), size, nn.initializers.zeros)
        x = x.astype(jnp.float32)
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return (x * scale + bias).astype(self.dtype)


class Dense(nn.Module):
    """Computes x W + b over the last `len(inputs)` axes; an axis is (logical name, size)."""

    inputs: tuple[tuple[str | None, int], ...]
    outputs: tuple[tuple[str | None, int], ...]

    @nn.compact
    def __call__(self, x: Float[Array, "rows time *in"]) -> Float[Array, "rows time *out"]:
        axes, shape = zip(*self.inputs, *self.outputs, strict=True)
        fan_in = np.prod([size for _, size in self.inputs])
        n = len(self.inputs)
        kernel = _parameter(self, "kernel", axes, shape, nn.initializers.normal(fan_in**-0.5))
        bias = _parameter(self, "bias", axes[n:], shape[n:], nn.initializers.zeros)
        return project(x, kernel, inputs=n) + bias.astype(x.dtype)


class Block(nn.Module):
    """Attention and MLP, each added to its input and then normalised (post-norm)."""

    config: DebertaConfig
    dtype: Any
    heads_at_once: int

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "rows time embed"],
        table: Float[Array, "1 distances embed"],
        real: Bool[Array, "rows time"],
    ) -> tuple[Float[Array, "rows time embed"], None]:
        c = self.config
        embed, mlp = ("embed", c.embed), ("mlp", c.mlp)
        heads = (("heads", c.heads), ("head_dim", c.head_dim))
        query, key, value = (Dense((embed,), heads, name=name) for name in ("q", "k", "v"))
        distance = diagonals(x.shape[1])
        context = disentangled_attention(
            query(x), key(x), value(x),
            to_query=key(table)[0][table_rows(c, distance)],
            to_key=query(table)[0][table_rows(c, -distance)],
            real=real, heads_at_once=self.heads_at_once,
        )  # fmt: skip
        y = Dense(heads, (embed,), name="o")(context)
        x = LayerNorm(c.norm_eps, self.dtype, name="attention_norm")(x + y)
        y = jax.nn.gelu(Dense((embed,), (mlp,), name="up")(x), approximate=False)
        y = Dense((mlp,), (embed,), name="down")(y)
        return LayerNorm(c.norm_eps, self.dtype, name="mlp_norm")(x + y), None


class Deberta(nn.Module):
    """The encoder: maps token ids to hidden states.

    Attributes:
      config: the encoder's hyperparameters.
      dtype: of activations and matrix products; norms and the softmax are always float32.
      heads_at_once: see `disentangled_attention`.
    """

    config: DebertaConfig
    dtype: Any = jnp.float32
    heads_at_once: int = 1

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "rows time"], lengths: Int[Array, " rows"]
    ) -> Float[Array, "rows time embed"]:
        """Hidden states of the last layer; those at positions >= `lengths` are meaningless."""
        c = self.config
        normal = nn.initializers.normal(0.02)
        embedding = _parameter(
            self, "embedding", ("vocab", "embed"), (c.vocab_size, c.embed), normal
        )
        table = _parameter(self, "distances", (None, "embed"), (2 * c.buckets, c.embed), normal)
        table = LayerNorm(c.norm_eps, self.dtype, name="distances_norm")(table)[None]
        x = LayerNorm(c.norm_eps, self.dtype, name="embedding_norm")(embedding[tokens])
        real = jnp.arange(tokens.shape[1]) < lengths[:, None]
        x, _ = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=cast(Any, (nn.broadcast, nn.broadcast)),
            length=c.layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.dtype, self.heads_at_once, name="layers")(x, table, real)
        return x


class PairScorer(nn.Module):
    """PairRM: scores how much better the first of two candidates is, given their source.

    Jiang et al. 2023 (LLM-Blender, arXiv 2306.02561), section 3.2, in the published model's form:
    score(c) = W2 tanh(W1 [h_source ; h_c] + b1) + b2 and logit = mean over tasks of
    score(first) - score(second), with h at the prefix token of each segment. The head is float32.
    """

    config: DebertaConfig
    tasks: int = 1
    dtype: Any = jnp.float32
    heads_at_once: int = 1

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "rows time"],
        lengths: Int[Array, " rows"],
        prefixes: Int[Array, "rows 3"],
    ) -> Float[Array, " rows"]:
        """The logit of each row; it is above 0 if the first candidate is better.

        Args:
          tokens, lengths: token ids, padded at the end.
          prefixes: positions of the prefix tokens of source, first and second candidate.
        """
        d = self.config.embed
        encoder = Deberta(self.config, self.dtype, self.heads_at_once, name="encoder")
        hidden = encoder(tokens, lengths)
        source, first, second = jnp.split(
            jnp.take_along_axis(hidden, prefixes[:, :, None], axis=1).astype(jnp.float32), 3, axis=1
        )
        both = jnp.concatenate([first, second], axis=1)
        x = jnp.concatenate([jnp.broadcast_to(source, both.shape), both], axis=-1)
        x = jnp.tanh(Dense(((None, 2 * d),), (("embed", d),), name="head_in")(x))
        scores = Dense((("embed", d),), ((None, self.tasks),), name="head_out")(x)
        return jnp.mean(scores[:, 0] - scores[:, 1], axis=-1)


def abstract_params(config: DebertaConfig, tasks: int = 1) -> Params:
    """Shapes, dtypes and logical axes of every parameter of `PairScorer`; nothing is allocated.

    Leaves are `nn.LogicallyPartitioned` boxes around `jax.ShapeDtypeStruct`.
    """
    tokens, one = jnp.zeros((1, 2), jnp.int32), jnp.ones(1, jnp.int32)
    init = PairScorer(config, tasks).init
    return jax.eval_shape(init, jax.random.key(0), tokens, one, jnp.zeros((1, 3), int))["params"]
