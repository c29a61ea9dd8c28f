"""The decoder in all its forms gives the same results, and each config field has its effect."""

from __future__ import annotations

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.models.cache import LayerCache
from selm_jax.models.config import (
    DecoderConfig,
    Growth,
    Heads,
    LayerKind,
    Linear,
    Llama3,
    LongRope,
    Mixture,
    Proportional,
    Rope,
    ScalarHead,
    UnsupportedModel,
    Yarn,
)
from selm_jax.models.decoder import REMAT, Decoder, abstract_params, parameter_count
from selm_jax.models.linear import project
from selm_jax.models.stacked import unstack
from selm_jax.weights.names import tensors


def some_tokens(rows: int, time: int, vocab: int = 96, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (rows, time)).astype(np.int32)


def causal(rows: int, time: int):
    """Positions and ends of rows that are one sequence each."""
    return jnp.broadcast_to(jnp.arange(time), (rows, time)), jnp.full((rows, time), time)


@cache
def apply(decoder: Decoder):
    """apply(decoder)(params, tokens, positions, end, ...) -> hidden, cache"""
    return jax.jit(lambda params, *args: decoder.apply({"params": params}, *args))


# --- what must not matter ----------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_irrelevant(window, side, tiny, random_params):
    config = tiny(window=window)
    params, run = random_params(config), apply(Decoder(config))
    tokens = some_tokens(2, 12)
    alone, _ = run(params, tokens, *causal(2, 12))

    def padded(seed):
        at = slice(7, 19) if side == "left" else slice(0, 12)
        wide, positions = some_tokens(2, 19, seed=seed), some_tokens(2, 19, seed=seed + 1)
        # Padding sees any of the padding, and on the right the sequence, too.
        ends = np.random.default_rng(seed).integers(0, 8 if side == "left" else 20, (2, 19))
        wide[:, at] = tokens
        positions[:, at], ends[:, at] = causal(2, 12)[0], 19
        hidden, _ = run(params, wide, positions, ends)
        return hidden[:, at]

    np.testing.assert_allclose(padded(1), alone, atol=2e-5)
    np.testing.assert_array_equal(padded(1), padded(3))


def test_a_token_that_sees_nothing_is_finite(tiny, random_params):
    config = tiny()
    tokens, positions = some_tokens(1, 4), jnp.zeros((1, 4), jnp.int32)
    nothing = jnp.zeros((1, 4), jnp.int32)
    hidden, _ = apply(Decoder(config))(random_params(config), tokens, positions, nothing)
    assert np.isfinite(hidden).all()


def test_positions_are_relative(tiny, random_params):
    config = tiny()
    run = partial(apply(Decoder(config)), random_params(config))
    tokens, (positions, end) = some_tokens(2, 16), causal(2, 16)
    near, _ = run(tokens, positions, end)
    far, _ = run(tokens, positions + 700, end)
    np.testing.assert_allclose(near, far, atol=5e-4)
    stretched, _ = run(tokens, positions * 2, end)
    assert np.abs(stretched - near).max() > 0.1


# --- the same function in other forms ----------------------------------------------------------


@cache
def values_and_gradients(decoder):
    def loss(params, tokens):
        hidden, _ = decoder.apply({"params": params}, tokens, *causal(*tokens.shape))
        return jnp.sum(hidden * jnp.sin(jnp.arange(hidden.size)).reshape(hidden.shape))

    return jax.jit(jax.value_and_grad(loss))


def assert_trees_close(a, b, atol=1e-4):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=atol), a, b)


@pytest.mark.slow_except("True-none", "True-dots", "False-full", "False-mlp")
@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("scan", [True, False])
def test_scanned_unrolled_and_every_remat_policy_agree(remat, scan, tiny, random_params):
    config = tiny()
    params, tokens = random_params(config), some_tokens(2, 16)
    decoder = Decoder(config, remat=remat, scan=scan)
    value, grads = values_and_gradients(decoder)(params if scan else unstack(params), tokens)
    expected, expected_grads = values_and_gradients(Decoder(config))(params, tokens)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert_trees_close(grads, expected_grads if scan else unstack(expected_grads))


def test_remat_policies_keep_less_and_less(tiny, random_params):
    config = tiny(layers=3)
    params, tokens = random_params(config), some_tokens(2, 16)

    def kept(remat):
        def loss(params):
            decoder = Decoder(config, remat=remat)
            return decoder.apply({"params": params}, tokens, *causal(2, 16))[0].sum()

        _, backward = jax.vjp(loss, params)
        return sum(x.size for x in jax.tree.leaves(backward))

    sizes = [kept(remat) for remat in ("none", "dots", "mlp", "full")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 4


def test_unstack_is_the_unrolled_decoders_tree(tiny, random_params):
    config = tiny(layers=3)
    own = jax.eval_shape(
        Decoder(config, scan=False).init, jax.random.key(0), some_tokens(1, 2), *causal(1, 2)
    )["params"]
    shapes = jax.tree.map(lambda x: x.shape, unstack(random_params(config)))
    assert shapes == jax.tree.map(
        lambda x: x.value.shape, own, is_leaf=lambda x: hasattr(x, "names")
    )


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("scan", [True, False])
def test_prefill_and_cached_steps_equal_one_forward(window, scan, tiny, random_params):
    """Rows of different lengths, junk in the cache, several new tokens at once, then one by one."""
    config = tiny(window=window)
    params = random_params(config) if scan else unstack(random_params(config))
    run = partial(apply(Decoder(config, scan=scan)), params)
    tokens, capacity, lengths = some_tokens(3, 14), 20, np.array([2, 6, 9])
    full, _ = run(tokens, *causal(3, 14))

    def empty(capacity):
        junk = jnp.full((config.layers, 3, config.kv_heads, capacity, config.head_dim), 9.0)
        whole = LayerCache(junk, junk)
        return whole if scan else tuple(jax.tree.map(lambda x: x[0], whole) for _ in range(2))

    first = causal(3, 9)
    _, cache = run(tokens[:, :9], *first, empty(9), jnp.zeros(3, jnp.int32))
    cache = jax.tree.map(
        lambda big, small: big.at[..., : small.shape[-2], :].set(small), empty(capacity), cache
    )
    index = lengths.copy()
    for count in (3, 1, 1):
        positions = index[:, None] + np.arange(count)
        new = np.take_along_axis(tokens, positions, axis=1)
        hidden, cache = run(new, positions, None, cache, jnp.array(index))
        expected = np.take_along_axis(np.asarray(full), positions[..., None], axis=1)
        np.testing.assert_allclose(hidden, expected, atol=2e-5)
        index += count


def test_bfloat16_is_close_to_float32(tiny, random_params):
    config = tiny()
    params, tokens = random_params(config), some_tokens(2, 16)
    exact, _ = apply(Decoder(config))(params, tokens, *causal(2, 16))
    half, _ = apply(Decoder(config, dtype=jnp.bfloat16))(params, tokens, *causal(2, 16))
    assert half.dtype == jnp.bfloat16
    assert np.abs(half.astype(jnp.float32) - exact).mean() < 0.05 * np.abs(exact).mean()


@pytest.mark.parametrize("inputs", [1, 2])
def test_project_and_its_gradient_are_those_of_the_plain_product(inputs):
    rng = np.random.default_rng(0)
    inner, outer = ((6,), (4, 3)) if inputs == 1 else ((4, 3), (6,))
    x = jnp.asarray(rng.normal(size=(2, 5, *inner)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(*inner, *outer)), jnp.float32)

    def plain(x, kernel):
        return jnp.tensordot(x, kernel, axes=inputs)

    y, backward = jax.vjp(partial(project, inputs=inputs), x, kernel)
    expected, plain_backward = jax.vjp(plain, x, kernel)
    np.testing.assert_allclose(y, expected, atol=1e-5)
    g = jnp.asarray(rng.normal(size=y.shape), jnp.float32)
    assert_trees_close(backward(g), plain_backward(g), atol=1e-5)


def test_projects_gradient_has_the_parameters_dtype():
    x, kernel = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 5))
    y, backward = jax.vjp(project, x, kernel)
    assert [g.dtype for g in backward(y)] == [jnp.bfloat16, jnp.float32]


# --- the facts ---------------------------------------------------------------------------------

LONG = LongRope((1.0, 2.0, 3.0, 4.0), (2.0, 4.0, 8.0, 16.0), 6, 1.0)
LLAMA3 = Llama3(8.0, 1.0, 4.0, 64)
YARN = Yarn(4.0, 64, 4.0, 0.5, 1.0)
MIXTURE = Mixture(4, 2, True)
PROPORTIONAL = Proportional(0.5, 2.0)


def kinds(*each):
    return {"kinds": tuple(each)}


# Name -> (what the base has beyond TINY, what the other one changes).
CHANGES = {
    "vocab_size": ({}, {"vocab_size": 80}),
    "embed": ({}, {"embed": 40}),
    "heads": ({}, {"heads": 2}),
    "kv_heads": ({}, {"kv_heads": 4}),
    "head_dim": ({}, {"head_dim": 12}),
    "mlp": ({}, {"mlp": 48}),
    "kinds": ({}, {"layers": 3}),
    "kinds: theta": ({}, {"rope_theta": 100.0}),
    "kinds: window": ({}, {"window": 3}),
    "kinds: no rope": ({}, kinds(LayerKind(None), LayerKind(Rope(1e4)))),
    "kinds: order": (
        kinds(LayerKind(None), LayerKind(Rope(1e4))), kinds(LayerKind(Rope(1e4)), LayerKind(None)),
    ),
    "kinds: linear": ({}, kinds(*[LayerKind(Rope(1e4, Linear(2.0)))] * 2)),
    **{
        f"kinds: llama3 {key}": (
            kinds(*[LayerKind(Rope(1e4, LLAMA3))] * 2),
            kinds(*[LayerKind(Rope(1e4, dataclasses.replace(LLAMA3, **{key: value})))] * 2),
        )
        for key, value in {"factor": 2.0, "low": 2.0, "high": 9.0, "original": 16}.items()
    },
    **{
        f"kinds: yarn {key}": (
            kinds(*[LayerKind(Rope(10.0, YARN))] * 2),
            kinds(*[LayerKind(Rope(10.0, dataclasses.replace(YARN, **{key: value})))] * 2),
        )
        for key, value in {
            "factor": 2.0, "original": 20, "fast": 9.0, "slow": 2.0, "magnitude": 1.5,
            "truncate": False,
        }.items()
    },
    **{
        f"kinds: longrope {key}": (
            kinds(*[LayerKind(Rope(1e4, dataclasses.replace(LONG, extended=key == "long")))] * 2),
            kinds(*[LayerKind(Rope(1e4, dataclasses.replace(
                LONG, **{"extended": key == "long", key: value})))] * 2),
        )
        for key, value in {
            "short": (4.0,) * 4, "long": (1.0,) * 4, "magnitude": 1.5, "extended": True,
        }.items()
    },
    "kinds: heads": ({}, kinds(*[LayerKind(Rope(1e4), heads=Heads(2, 8, True))] * 2)),
    **{
        f"kinds: proportional {key}": (
            kinds(*[LayerKind(Rope(1e4, PROPORTIONAL))] * 2),
            kinds(*[LayerKind(Rope(1e4, dataclasses.replace(PROPORTIONAL, **{key: value})))] * 2),
        )
        for key, value in {"share": 1.0, "factor": 3.0}.items()
    },
    "norm_eps": ({}, {"norm_eps": 0.1}),
    "tied": ({}, {"tied": True}),
    "max_positions": ({}, {"max_positions": 99}),
    "architecture": ({}, {"architecture": "Phi3ForCausalLM"}),
    "activation": ({}, {"activation": "gelu_tanh"}),
    "qkv_bias": ({}, {"qkv_bias": True}),
    "out_bias": ({}, {"out_bias": True}),
    "mlp_bias": ({}, {"mlp_bias": True}),
    "qk_norm": ({}, {"qk_norm": "head"}),
    "qk_norm: of what": ({"qk_norm": "head"}, {"qk_norm": "projection"}),
    "sinks": ({}, {"sinks": True}),
    "value_norm": ({}, {"value_norm": True}),
    "keys_as_values": ({}, {"keys_as_values": True}),
    "pre_norms": ({}, {"pre_norms": False}),
    "post_norms": ({}, {"post_norms": True}),
    "norm_offset": ({}, {"norm_offset": 1.0}),
    "rotary_fraction": ({}, {"rotary_fraction": 0.5}),
    "rotary_pairs": ({}, {"rotary_pairs": "neighbours"}),
    "query_growth": ({}, {"query_growth": Growth(0.5, 4)}),
    "query_growth: rate": (
        {"query_growth": Growth(0.5, 4)}, {"query_growth": Growth(0.7, 4)},
    ),
    "query_growth: every": (
        {"query_growth": Growth(0.5, 4)}, {"query_growth": Growth(0.5, 2)},
    ),
    "embed_scale": ({}, {"embed_scale": 3.0}),
    "residual_scale": ({}, {"residual_scale": 0.3}),
    "layer_scale": ({}, {"layer_scale": True}),
    "query_scale": ({}, {"query_scale": 1.0}),
    "attention_cap": ({}, {"attention_cap": 0.5}),
    "logit_cap": ({}, {"logit_cap": 1.0}),
    "logit_divisor": ({}, {"logit_divisor": 3.0}),
    "mixture": ({}, {"mixture": MIXTURE}),
    "mixture: active": (
        {"mixture": MIXTURE}, {"mixture": dataclasses.replace(MIXTURE, active=3)},
    ),
    "mixture: normalized": (
        {"mixture": MIXTURE}, {"mixture": dataclasses.replace(MIXTURE, normalized=False)},
    ),
    "head": ({}, {"head": ScalarHead()}),
}  # fmt: skip


def test_every_field_is_changed_in_turn():
    assert {name.partition(":")[0] for name in CHANGES} == {
        f.name for f in dataclasses.fields(DecoderConfig)
    }


@pytest.mark.parametrize("name", CHANGES)
def test_no_field_is_decoration(name, tiny, random_params, all_logits):
    own, changes = CHANGES[name]
    base, other = tiny(**own), tiny(**(own | changes))

    def shapes(config):
        return jax.tree.map(jnp.shape, random_params(config))

    if shapes(other) != shapes(base):  # other parameters: `load` would not take the old ones
        return
    if name == "max_positions":
        base.for_length(100)
        with pytest.raises(UnsupportedModel, match="100 tokens"):
            other.for_length(100)
        return
    if name == "architecture":  # says under which names the weights are stored
        assert {t.name for t in tensors(other).values()} != {t.name for t in tensors(base).values()}
        return

    def run(config):
        return jax.jit(partial(all_logits, Decoder(config)))(random_params(base), tokens)

    tokens = some_tokens(1, 12, vocab=80)
    assert np.abs(run(other) - run(base)).max() > 1e-2


@pytest.mark.parametrize("changes", [{"heads": 3}, {"kv_heads": 3}, {"head_dim": 7}])
def test_impossible_shapes_are_refused(changes, tiny):
    with pytest.raises(UnsupportedModel):
        tiny(**changes)


def test_abstract_parameters_allocate_nothing_and_name_every_axis(tiny):
    huge = tiny(
        embed=8192, layers=80, heads=64, kv_heads=8, head_dim=128, mlp=28672, vocab_size=128256
    )
    assert parameter_count(huge) == 70_553_706_496  # Llama-3-70B
    for box in jax.tree.leaves(abstract_params(huge), is_leaf=lambda x: hasattr(x, "names")):
        assert len(box.names) == len(box.value.shape)
        assert isinstance(box.value, jax.ShapeDtypeStruct)
