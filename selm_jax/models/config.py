"""`DecoderConfig`: the hyperparameters with which one decoder covers many model families.

A family of models is a set of values here, never a subclass and never a test on a name.
`models.families` reads the values from a `config.json`.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

RotaryPairs = Literal["halves", "neighbours"]  # which dimensions a rotation takes together


class UnsupportedModel(ValueError):
    """The checkpoint describes a model that the decoder cannot express."""


@dataclasses.dataclass(frozen=True)
class Linear:
    """Linear scaling: divides all frequencies by `factor` (position interpolation, 2306.15595)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Llama 3.1 scaling: divides low frequencies by `factor`, keeps high ones, blends in between.

    A frequency is low if its wavelength is above original / low, and high if it is below
    original / high.
    """

    factor: float
    low: float
    high: float
    original: int


@dataclasses.dataclass(frozen=True)
class LongRope:
    """LongRoPE scaling: a divisor for each frequency from one of two tables (arXiv 2402.13753).

    Attributes:
      short, long: the tables, [head_dim / 2].
      original: positions before the extension. Sequences up to this length use `short`, longer
        ones `long`.
      magnitude: multiplies cosines and sines, with either table.
      extended: whether `long` is used. This is decided once for a run, by the longest sequence that
        it may see (`DecoderConfig.for_length`), so that no log-probability depends on what else is
        in the batch. vLLM does the same; transformers looks at the longest sequence of each batch.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original: int
    magnitude: float
    extended: bool = False


@dataclasses.dataclass(frozen=True)
class Yarn:
    """YaRN scaling: like `Llama3`, but blends along the dimensions (arXiv 2309.00071).

    Attributes:
      factor: divides the low frequencies.
      original: positions before the extension.
      fast, slow: frequencies that turn more than `fast` times within `original` positions are kept,
        those that turn fewer than `slow` times are divided, and those in between are blended.
      magnitude: multiplies cosines and sines.
      truncate: whether the two bounds are rounded outwards to whole dimensions.
    """

    factor: float
    original: int
    fast: float
    slow: float
    magnitude: float
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class Proportional:
    """Rotates a share of the pairs, the fastest ones, and leaves the others as they are (Gemma 4).

    Attributes:
      share: how many of the pairs are rotated. Their frequencies are those that they have if all
        are, unlike with `DecoderConfig.rotary_fraction`.
      factor: divides the frequencies.
    """

    share: float
    factor: float = 1.0

    def __post_init__(self):
        if self.share > 1:
            raise UnsupportedModel(
                f"config.json: partial_rotary_factor is {self.share:g}; expected a number up to 1"
            )


@dataclasses.dataclass(frozen=True)
class Rope:
    """The settings of rotary position embeddings.

    Attributes:
      theta: base of the frequencies.
      scaling: how the frequencies are changed for longer contexts.
    """

    theta: float
    scaling: Linear | Llama3 | LongRope | Yarn | Proportional | None = None


@dataclasses.dataclass(frozen=True)
class Growth:
    """Makes queries longer in steps: at position p by 1 + rate * log(1 + floor(p / every)).

    This keeps attention sharp when it is spread over more keys (Llama 4, Ministral 3).
    """

    rate: float
    every: int


@dataclasses.dataclass(frozen=True)
class Heads:
    """The heads of a layer, where layers of one model differ in them (Gemma 4).

    Attributes:
      kv_heads, head_dim, keys_as_values: as in `DecoderConfig`.
    """

    kv_heads: int
    head_dim: int
    keys_as_values: bool


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """The properties in which layers of one model may differ: position embedding, window, heads.

    Attributes:
      rope: None leaves queries and keys as they are (NoPE).
      window: a token sees the last `window` positions, itself included; None sees all.
      heads: None for those of the model.
    """

    rope: Rope | None
    window: int | None = None
    heads: Heads | None = None


@dataclasses.dataclass(frozen=True)
class Clamp:
    """The clamped gates of gpt-oss's experts: g * sigmoid(alpha * g) * (u + 1).

    Here g and u are the outputs of `gate` and `up`, g at most `limit`, and u between -limit and
    limit.
    """

    alpha: float
    limit: float


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The properties of a mixture of experts, which every layer then has in place of its MLP.

    Attributes:
      experts: number of experts of a layer.
      active: number of experts that compute each token: those with the highest probabilities.
      normalized: whether the weights of a token's experts are made to sum to one. Otherwise they
        are the router's probabilities among all experts.
      biases: whether the router and the experts' kernels have biases.
      clamp: clamped gates, in place of the activation; None: the activation alone.
    """

    experts: int
    active: int
    normalized: bool
    biases: bool = False
    clamp: Clamp | None = None

    def __post_init__(self):
        if self.active > self.experts:
            raise UnsupportedModel(
                f"num_experts_per_tok is {self.active}, but a layer has only {self.experts} "
                "experts; expected at most that number"
            )


@dataclasses.dataclass(frozen=True)
class ScalarHead:
    """A reward model's head: one number for a whole text in place of logits.

    Attributes:
      pad: `pad_token_id` of `config.json`. Tokens with this id at the end of a text are skipped,
        even if they belong to the text, because transformers takes them for padding.
    """

    pad: int | None = None

    def read(self, ids: tuple[int, ...]) -> tuple[int, ...]:
        """Cuts a text after the token at which its score is read.

        Like transformers, this is the last token that is not `pad`; the first token if all are
        `pad`. A causal model does not need the tokens after it.
        """
        end = len(ids)
        while end > 1 and ids[end - 1] == self.pad:
            end -= 1
        return ids[:end]


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The decoder's hyperparameters. Hashable, so that it can be a static argument of jit.

    Attributes:
      vocab_size: rows of the embedding.
      embed: width of the residual stream.
      heads, kv_heads, head_dim: attention; `heads` is a multiple of `kv_heads`. A layer whose kind
        has heads of its own has other `kv_heads` and `head_dim`; `of` says those of each kind.
      mlp: width of the gated MLP, or of each expert.
      kinds: one entry per layer.
      norm_eps: epsilon inside the root mean square.
      tied: whether the unembedding is the embedding.
      max_positions: the number of positions that the model was made for.
      architecture: the family's class of language models; it determines the names of tensors.
      activation: the activation of the MLP's gate: "silu", "gelu" or "gelu_tanh", which
        approximates "gelu".
      qkv_bias, out_bias, mlp_bias: whether the projections into attention, out of attention, and
        of the MLP have biases.
      qk_norm: whether queries and keys are normalised before they are rotated: each head by itself
        ("head"), or all heads of a token together ("projection").
      sinks: whether each head has an attention sink: a learned score that has no value.
      value_norm: whether the values of each head are normalised, without a stored scale.
      keys_as_values: whether values are the keys before their norm, with no kernel of their own.
      pre_norms, post_norms: whether the inputs of attention and MLP are normalised, and whether
        their outputs are.
      norm_offset: added to the stored scales of norms.
      rotary_fraction: the share of each head's dimensions, the first ones, that rope rotates.
      rotary_pairs: which dimensions rope rotates together: i and i + half of them ("halves"), or
        2 i and 2 i + 1 ("neighbours").
      embed_scale: multiplies embedded tokens.
      residual_scale: multiplies what attention and MLP add to the residual stream.
      layer_scale: whether each layer's output is multiplied by a stored number, which is never
        trained.
      query_scale: multiplies queries; None means head_dim ** -0.5.
      query_growth: multiplies queries by a factor that grows with their position, too.
      attention_cap, logit_cap: c in c * tanh(x / c), applied to attention scores and to logits;
        None applies nothing.
      logit_divisor: divides logits.
      mixture: the layers' mixture of experts; None for a dense model.
      head: a reward model's head, in place of the unembedding; None for a language model.
    """

    vocab_size: int
    embed: int
    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    kinds: tuple[LayerKind, ...]
    norm_eps: float
    tied: bool
    max_positions: int
    architecture: str
    activation: str = "silu"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: Literal["head", "projection"] | None = None
    sinks: bool = False
    value_norm: bool = False
    keys_as_values: bool = False
    pre_norms: bool = True
    post_norms: bool = False
    norm_offset: float = 0.0
    rotary_fraction: float = 1.0
    rotary_pairs: RotaryPairs = "halves"
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    layer_scale: bool = False
    query_scale: float | None = None
    query_growth: Growth | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    logit_divisor: float = 1.0
    mixture: Mixture | None = None
    head: ScalarHead | None = None

    def __post_init__(self):
        if self.heads % self.kv_heads:
            raise UnsupportedModel(
                f"{self.heads} attention heads cannot share {self.kv_heads} key-value heads "
                "evenly; expected a multiple of that number"
            )
        if self.rotated % 2 or not 0 < self.rotated <= self.head_dim:
            share = f" times partial_rotary_factor {self.rotary_fraction:g}"
            raise UnsupportedModel(
                f"head_dim is {self.head_dim}{share * (self.rotary_fraction != 1)}; expected an "
                "even number, because rotary embeddings rotate pairs of dimensions"
            )
        for kind in self.kinds:
            if kind.heads is not None:
                self.of(kind)  # which checks these heads
                continue
            scaling = kind.rope.scaling if kind.rope else None
            if isinstance(scaling, LongRope):
                for name in ("short", "long"):
                    if len(getattr(scaling, name)) != self.rotated // 2:
                        raise UnsupportedModel(
                            f"{name}_factor has {len(getattr(scaling, name))} numbers; expected "
                            f"{self.rotated // 2}, half of the rotated dimensions of a head"
                        )

    @property
    def layers(self) -> int:
        return len(self.kinds)

    @property
    def rotated(self) -> int:
        """The number of dimensions of each head that rope rotates."""
        return int(self.head_dim * self.rotary_fraction)

    @property
    def distinct_kinds(self) -> tuple[LayerKind, ...]:
        return tuple(dict.fromkeys(self.kinds))

    def of(self, kind: LayerKind) -> DecoderConfig:
        """The facts as a layer of this kind sees them, with its own heads in place of the model's.

        If the layer has no heads of its own, they are those of the model.
        """
        if kind.heads is None:
            return self
        own = dataclasses.asdict(kind.heads)
        return dataclasses.replace(self, kinds=(dataclasses.replace(kind, heads=None),), **own)

    @property
    def each_layer(self) -> tuple[DecoderConfig, ...]:
        """The facts as each layer sees them (`of`)."""
        found = {kind: self.of(kind) for kind in self.distinct_kinds}
        return tuple(found[kind] for kind in self.kinds)

    @property
    def cycle(self) -> int:
        """The number of layers after which all kinds repeat; 1 if all layers have the same heads.

        Layers are stacked by it (`models.stacked`): those of one stack have equal shapes.
        """
        n = self.layers
        if len({kind.heads for kind in self.kinds}) == 1:
            return 1
        return next(
            p for p in range(1, n + 1) if n % p == 0 and self.kinds == self.kinds[:p] * (n // p)
        )

    @property
    def has_two_tables(self) -> bool:
        """Says whether the rotary frequencies depend on the length of the sequence (LongRoPE)."""
        return any(k.rope is not None and isinstance(k.rope.scaling, LongRope) for k in self.kinds)

    def for_length(self, positions: int) -> DecoderConfig:
        """The config for sequences of up to `positions` tokens: chooses the table of LongRoPE.

        Raises:
          UnsupportedModel: if the model was made for fewer positions.
        """
        if positions > self.max_positions:
            raise UnsupportedModel(
                f"the settings allow sequences of up to {positions} tokens; the model was made for "
                f"at most {self.max_positions} (max_position_embeddings). Lower the limits on "
                "prompts and answers, or use a model with a longer context"
            )

        def choose(kind: LayerKind) -> LayerKind:
            rope = kind.rope
            if rope is None or not isinstance(rope.scaling, LongRope):
                return kind
            scaling = dataclasses.replace(rope.scaling, extended=positions > rope.scaling.original)
            return dataclasses.replace(kind, rope=dataclasses.replace(rope, scaling=scaling))

        return dataclasses.replace(self, kinds=tuple(map(choose, self.kinds)))
