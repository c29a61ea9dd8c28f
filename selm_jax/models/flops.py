"""Counts the floating point operations of the decoder and of PairRM's encoder by formulas.

A multiply-add counts as two operations. Norms, softmax, rotations and the optimiser are left out:
they are under 1 % for any model of practical size. So are adapters: with rank 16 in Qwen3-30B-A3B,
they take 3 % of the operations of the kernels that they adapt. The backward pass does twice the
forward pass's work; recomputation by rematerialisation is not counted, as usual for model FLOP
utilisation (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from selm_jax.models.config import DecoderConfig
from selm_jax.models.config_deberta import DebertaConfig


@dataclasses.dataclass(frozen=True)
class Flops:
    """The operations of the layers' matrix products, of attention, and of the unembedding."""

    dense: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.dense + self.attention + self.head

    def __mul__(self, times: int) -> Flops:
        return Flops(times * self.dense, times * self.attention, times * self.head)


def passed(config: DecoderConfig, *, tokens: int, pairs: int, scored: int) -> Flops:
    """Counts the operations of one forward pass.

    Args:
      config: the model.
      tokens: number of tokens in all rows.
      pairs: number of pairs of a query and a key whose score is computed, in one layer.
      scored: number of tokens whose logits are computed.
    """
    return Flops(
        dense=2 * tokens * sum(map(_weights, config.each_layer)),
        attention=4 * pairs * sum(c.heads * c.head_dim for c in config.each_layer),
        head=2 * scored * config.embed * config.vocab_size,
    )


def _weights(c: DecoderConfig) -> int:
    """The numbers in the kernels of one layer that multiply each token."""
    heads, kv_heads = c.heads * c.head_dim, c.kv_heads * c.head_dim
    mlp = 3 * c.embed * c.mlp
    if c.mixture is not None:  # a token's experts, and the router
        mlp = c.mixture.active * mlp + c.embed * c.mixture.experts
    return c.embed * (2 * heads + (1 if c.keys_as_values else 2) * kv_heads) + mlp


def forward(config: DecoderConfig, *, rows: int, time: int, keys: int, scored: int) -> Flops:
    """Counts the operations of one forward pass over [rows, time] tokens.

    Args:
      config: the model.
      rows, time: shape of the batch.
      keys: number of keys per token. Scores are computed for masked keys too, so these count.
      scored: tokens of each row whose logits are computed.
    """
    tokens = rows * time
    return passed(config, tokens=tokens, pairs=tokens * keys, scored=rows * scored)


def forward_and_backward(
    config: DecoderConfig, *, rows: int, time: int, keys: int, scored: int
) -> Flops:
    """Counts the operations of a forward and a backward pass: three times the forward pass."""
    return forward(config, rows=rows, time=time, keys=keys, scored=scored) * 3


def visible_pairs(prompt: int, responses: Sequence[int] = ()) -> int:
    """Counts the (query, key) pairs in a prompt tree where the query sees the key.

    Args:
      prompt: number of tokens of the prompt, or of a whole text without responses.
      responses: number of tokens of each response.
    """
    return prompt * (prompt + 1) // 2 + sum(r * prompt + r * (r + 1) // 2 for r in responses)


def encoder(config: DebertaConfig, *, rows: int, time: int) -> int:
    """Counts the operations of one forward pass of DeBERTa over [rows, time] tokens.

    Attention by distance scores every token against 2 * time distances, in both directions. With
    the content scores and the weighted mean of the values, this makes 1 + 2 + 2 + 1 products of
    time x time x embed.
    """
    c = config
    weights = c.layers * (4 * c.embed * c.embed + 2 * c.embed * c.mlp)
    return 2 * rows * time * (weights + 6 * time * c.layers * c.embed)
