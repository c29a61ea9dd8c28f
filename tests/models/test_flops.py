"""Our formulas for FLOPs against XLA's count for the compiled program."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from selm_jax.models import flops
from selm_jax.models.config import Heads, LayerKind, Rope
from selm_jax.models.decoder import Decoder, abstract_params, unembedding
from selm_jax.models.stacked import unstack


def counted(config, rows: int, time: int, scored: int, backward: bool = False) -> float:
    """XLA's count, on the unrolled decoder: it counts the body of a scan only once."""
    decoder = Decoder(config, scan=False)
    params = jax.eval_shape(unstack, nn.unbox(abstract_params(config)))
    tokens = jax.ShapeDtypeStruct((rows, time), jnp.int32)

    def total(params, tokens):
        hidden, _ = decoder.apply({"params": params}, tokens, tokens)
        logits = hidden[:, :scored] @ unembedding(params).T
        return jnp.sum(logits * logits)

    f = jax.grad(total) if backward else total
    return jax.jit(f).lower(params, tokens).cost_analysis()["flops"]


@pytest.mark.parametrize(
    "facts",
    [
        {},
        {"kv_heads": 4},
        {"head_dim": 32},
        {"layers": 3, "mlp": 640},
        {"heads": 8},
        {"kinds": (LayerKind(Rope(1e4)), LayerKind(Rope(1e4), heads=Heads(4, 32, True)))},
    ],
)
def test_the_forward_pass_is_counted_as_xla_counts_it(tiny, facts):
    config = tiny(**({"embed": 128, "mlp": 512, "head_dim": 16, "vocab_size": 512} | facts))
    hand = flops.forward(config, rows=2, time=48, keys=48, scored=20).total
    # XLA also counts norms, softmax and rotations, which are a larger part of a model this small.
    assert hand < counted(config, 2, 48, 20) < 1.12 * hand


def test_a_pass_of_training_is_three_forward_passes(tiny):
    config = tiny(embed=128, mlp=512, head_dim=16, vocab_size=512)
    hand = flops.forward_and_backward(config, rows=2, time=48, keys=48, scored=20).total
    assert hand == 3 * flops.forward(config, rows=2, time=48, keys=48, scored=20).total
    assert 0.97 * hand < counted(config, 2, 48, 20, backward=True) < 1.12 * hand


def test_each_part_counts_its_own_sizes(tiny):
    def count(**changed):
        sizes = {"rows": 2, "time": 16, "keys": 16, "scored": 8} | changed
        return flops.forward(tiny(), **sizes)

    once = count()
    assert count(keys=32) == dataclasses.replace(once, attention=2 * once.attention)
    assert count(scored=16) == dataclasses.replace(once, head=2 * once.head)
    assert count(rows=4).total == 2 * once.total
