"""Floating point operations of the decoder and of PairRM's encoder, counted by hand.

A multiplication with its addition counts as two. Norms, softmax, rotations and the optimiser are
left out: under 1 % of any model that one trains. The backward pass does twice the forward pass's
work; what rematerialisation computes again is not counted, as is the custom for model FLOP
utilisation (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import dataclasses

from selm_jax.models.config import DecoderConfig
from selm_jax.models.config_deberta import DebertaConfig


@dataclasses.dataclass(frozen=True)
class Flops:
    """Of the weights' products in the layers, of attention, and of the unembedding."""

    dense: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.dense + self.attention + self.head


def forward(config: DecoderConfig, *, rows: int, time: int, keys: int, scored: int) -> Flops:
    """One forward pass over [rows, time] tokens.

    Args:
      keys: entries that every token's scores are computed for. A mask hides some of them, but their
        scores are computed all the same, so they count.
      scored: tokens of each row that meet the unembedding.
    """
    c = config
    heads, kv_heads = c.heads * c.head_dim, c.kv_heads * c.head_dim
    weights = c.layers * (2 * c.embed * heads + 2 * c.embed * kv_heads + 3 * c.embed * c.mlp)
    return Flops(
        dense=2 * rows * time * weights,
        attention=4 * rows * time * keys * c.layers * heads,
        head=2 * rows * scored * c.embed * c.vocab_size,
    )


def forward_and_backward(
    config: DecoderConfig, *, rows: int, time: int, keys: int, scored: int
) -> Flops:
    """One pass of training: the forward pass and twice as much behind it."""
    once = forward(config, rows=rows, time=time, keys=keys, scored=scored)
    return Flops(3 * once.dense, 3 * once.attention, 3 * once.head)


def encoder(config: DebertaConfig, *, rows: int, time: int) -> int:
    """One forward pass of DeBERTa over [rows, time] tokens.

    Attention by distance scores every token against 2 * time distances, in both directions: with
    content scores and the mean of values, 1 + 2 + 2 + 1 products of time x time x embed.
    """
    c = config
    weights = c.layers * (4 * c.embed * c.embed + 2 * c.embed * c.mlp)
    return 2 * rows * time * (weights + 6 * time * c.layers * c.embed)
