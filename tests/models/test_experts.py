"""A mixture of experts against its definition: every expert computes every token, then a choice."""

from __future__ import annotations

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.models import experts, flops
from selm_jax.models.config import Clamp, Mixture, UnsupportedModel
from selm_jax.models.decoder import (
    Decoder,
    abstract_adapters,
    abstract_params,
    active_parameters,
    parameter_count,
)
from selm_jax.models.experts import Experts, expert_counts, load_metrics
from selm_jax.models.lora import Lora, LoraError, init, merge
from selm_jax.models.quantize import dequantize, quantize
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, shardings

MIXTURES = {
    "normalized": Mixture(8, 3, True),
    "as they are": Mixture(8, 3, False),
    "with biases and clamped": Mixture(8, 3, True, biases=True, clamp=Clamp(1.7, 0.9)),
}


def kernels(config, seed: int = 0):
    d, f, e = config.embed, config.mlp, config.mixture.experts
    shapes = {"router": (d, e), "gate": (e, d, f), "up": (e, d, f), "down": (e, f, d)}
    if config.mixture.biases:
        biases = {"router": (e,), "gate": (e, f), "up": (e, f), "down": (e, d)}
        shapes |= {f"{k}_bias": shape for k, shape in biases.items()}
    rng = np.random.default_rng(seed)
    return {k: rng.normal(0, 0.5, s).astype(np.float32) for k, s in shapes.items()}


def by_definition(p, x, mixture):
    """The sum over all experts, weighted by probability, of which all but the largest are zero."""
    probability = jax.nn.softmax(x @ p["router"] + p.get("router_bias", 0), axis=-1)
    least = jnp.sort(probability, axis=-1)[..., -mixture.active, None]
    weight = jnp.where(probability >= least, probability, 0)
    if mixture.normalized:
        weight = weight / weight.sum(-1, keepdims=True)
    gate = jnp.einsum("rtd,edf->rtef", x, p["gate"]) + p.get("gate_bias", 0)
    up = jnp.einsum("rtd,edf->rtef", x, p["up"]) + p.get("up_bias", 0)
    if mixture.clamp is None:
        y = jax.nn.silu(gate) * up
    else:
        alpha, limit = mixture.clamp.alpha, mixture.clamp.limit
        gate, up = jnp.where(gate > limit, limit, gate), jnp.clip(up, -limit, limit)
        y = (up + 1) * gate / (1 + jnp.exp(-alpha * gate))
    y = jnp.einsum("rtef,efd->rted", y, p["down"]) + p.get("down_bias", 0)
    return jnp.einsum("rted,rte->rtd", y, weight)


def undefined_behind_the_last_group(x, kernels, sizes):
    """`ragged_dot` as an accelerator may compute it: anything in rows of no group."""
    y = plain_ragged_dot(x, kernels, sizes)
    return jnp.where(jnp.arange(len(y))[:, None] < sizes.sum(), y, jnp.nan)


plain_ragged_dot = jax.lax.ragged_dot


@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        ("normalized", None),
        ("as they are", (1, 2, 4)),
        ("with biases and clamped", (1, 2, 4)),
        pytest.param("with biases and clamped", None, marks=pytest.mark.slow),
        pytest.param("normalized", (2, 4, 1), marks=pytest.mark.slow),
        pytest.param("as they are", None, marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_those_of_the_definition(name, mesh, tiny, monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_dot", undefined_behind_the_last_group)
    config = tiny(mixture=MIXTURES[name])
    layer = Experts(config, config.mixture, None if mesh is None else make_mesh(mesh))
    rng = np.random.default_rng(1)
    p, x, g = kernels(config), rng.normal(size=(8, 3, config.embed)), rng.normal(size=(8, 3, 1))
    x, g = x.astype(np.float32), g.astype(np.float32)

    def total(computed):
        return jax.jit(jax.value_and_grad(lambda p, x: jnp.sum(g * computed(p, x)), (0, 1)))

    ours, ours_gradients = total(jax.checkpoint(lambda p, x: layer.apply({"params": p}, x)))(p, x)
    theirs, gradients = total(lambda p, x: by_definition(p, x, config.mixture))(p, x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4),
        ours_gradients,
        gradients,
    )


def test_no_token_is_dropped_and_no_answer_depends_on_its_neighbours(tiny):
    """All neighbours want the same experts as the first row."""
    config = tiny(mixture=MIXTURES["normalized"])
    layer, p = Experts(config, config.mixture, None), kernels(config)
    x = np.random.default_rng(2).normal(size=(1, 40, config.embed)).astype(np.float32)
    run = jax.jit(lambda x: layer.apply({"params": p}, x))
    crowd = np.repeat(x[:, :1], 40, axis=1)
    alone, beside = run(x), run(np.concatenate([x] + [crowd] * 9))
    np.testing.assert_allclose(beside[0], alone[0], rtol=1e-5, atol=1e-5)


def test_loads_count_tokens_and_no_padding(tiny, random_params):
    config = tiny(mixture=Mixture(4, 2, True), layers=3)
    params = random_params(config)
    tokens = np.random.default_rng(3).integers(0, 96, (2, 9))
    positions = np.broadcast_to(np.arange(9), (2, 9))
    real = np.ones((2, 9), bool)
    real[1, 4:] = False

    @jax.jit
    def counts(tokens, weight):
        variables = {"params": params}
        _, left = Decoder(config).apply(variables, tokens, positions, mutable=[experts.LOAD])
        chosen = left[experts.LOAD]["layers"]["experts"]["chosen"]
        assert chosen.shape == (3, 2, 9, 2)
        return expert_counts(chosen, weight, config.mixture)

    found = counts(tokens, real)
    np.testing.assert_array_equal(found.sum(-1), [real.sum() * 2] * 3)
    np.testing.assert_array_equal(found, counts(np.where(real, tokens, 7), real))
    assert np.any(found != counts(tokens, np.ones_like(real)))


def test_metrics_of_an_even_and_of_an_uneven_load():
    even, one = jnp.full((2, 4), 5.0), jnp.array([[20.0, 0, 0, 0], [5, 5, 5, 5]])
    assert load_metrics(even) == {"experts/load_max": 1, "experts/unused": 0}
    assert load_metrics(one) == {"experts/load_max": 2.5, "experts/unused": 3 / 8}


def test_experts_are_sharded_over_tensor_and_their_inside_is_not(tiny):
    config = tiny(mixture=Mixture(8, 2, True, biases=True), heads=4, kv_heads=4)
    found = shardings(abstract_params(config), make_mesh((1, 2, 4)), TRAINING)["layers"]["experts"]
    assert {k: tuple(s.spec) for k, s in found.items()} == {
        "router": (None, "fsdp", None),
        "gate": (None, "tensor", "fsdp", None),
        "up": (None, "tensor", "fsdp", None),
        "down": (None, "tensor", None, "fsdp"),
        "router_bias": (None, None),
        "gate_bias": (None, "tensor", None),
        "up_bias": (None, "tensor", None),
        "down_bias": (None, "tensor", "fsdp"),
    }


def test_active_parameters_and_operations_are_those_of_a_token(tiny):
    config = tiny(mixture=Mixture(8, 3, True), layers=2)
    expert = 3 * config.embed * config.mlp
    assert parameter_count(config) - active_parameters(config) == 2 * 5 * (expert + config.embed)
    dense = dataclasses.replace(config, mixture=None)
    assert active_parameters(dense) == parameter_count(dense)
    counted = [flops.forward(c, rows=1, time=10, keys=10, scored=0).dense for c in (config, dense)]
    assert counted[0] - counted[1] == 2 * 10 * 2 * (2 * expert + 8 * config.embed)


def test_more_active_experts_than_there_are():
    with pytest.raises(UnsupportedModel, match="num_experts_per_tok is 5, .* only 4 experts"):
        Mixture(4, 5, True)


ADAPTED = Lora(2, 6.0, experts=True)


@pytest.mark.parametrize(
    ("name", "mesh"), [("normalized", None), ("with biases and clamped", (1, 2, 4))]
)
def test_adapters_of_experts_and_merged_kernels_are_one_function_with_one_gradient(
    name, mesh, tiny, monkeypatch
):
    monkeypatch.setattr(jax.lax, "ragged_dot", undefined_behind_the_last_group)
    config = tiny(mixture=MIXTURES[name])
    mesh = None if mesh is None else make_mesh(mesh)
    layer = Experts(config, config.mixture, mesh, ADAPTED, name="experts")
    rng = np.random.default_rng(1)
    p, x, g = kernels(config), rng.normal(size=(8, 3, config.embed)), rng.normal(size=(8, 3, 1))
    x, g = x.astype(np.float32), g.astype(np.float32)
    abstract = nn.unbox(abstract_adapters(config, ADAPTED))["layers"]["experts"]
    adapters = {k: rng.normal(0, 0.3, v.shape[1:]).astype(np.float32) for k, v in abstract.items()}

    def apart(adapters):
        return jnp.sum(g * layer.apply({"params": p, "lora": adapters}, x))

    def merged(adapters):
        of_layers = [
            {"layers": {"experts": {k: v[None] for k, v in each.items()}}} for each in (p, adapters)
        ]
        found = merge(*of_layers, ADAPTED)["layers"]["experts"]
        return jnp.sum(g * by_definition({k: v[0] for k, v in found.items()}, x, config.mixture))

    (ours, our_gradients), (theirs, gradients) = (
        jax.jit(jax.value_and_grad(each))(adapters) for each in (apart, merged)
    )
    assert abs(theirs - jnp.sum(g * by_definition(p, x, config.mixture))) > 0.1
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-3),
        our_gradients,
        gradients,
    )


def test_each_expert_has_adapters_that_are_cut_as_its_kernels_are(tiny):
    config = tiny(mixture=Mixture(8, 2, True), heads=4, kv_heads=4)
    abstract = abstract_adapters(config, ADAPTED)
    found = shardings(abstract, make_mesh((1, 2, 4)), TRAINING)["layers"]["experts"]
    assert {k: tuple(s.spec) for k, s in found.items()} == {
        "gate_a": (None, "tensor", "fsdp", None),
        "gate_b": (None, "tensor", None, None),
        "up_a": (None, "tensor", "fsdp", None),
        "up_b": (None, "tensor", None, None),
        "down_a": (None, "tensor", None, None),
        "down_b": (None, "tensor", None, "fsdp"),
    }
    assert set(abstract["layers"]["attention"]) == {f"{k}_{h}" for k in "qkvo" for h in "ab"}
    # A is drawn by the inputs of one expert, not of all.
    a = init(nn.unbox(abstract), jax.random.key(0))["layers"]["experts"]["up_a"]
    bound = config.embed**-0.5
    assert 0.9 * bound < np.abs(a).max() <= bound


def test_experts_have_adapters_only_if_they_are_asked_for(tiny):
    config = tiny(mixture=Mixture(4, 2, True))
    found = abstract_adapters(config, Lora(rank=2, alpha=4, targets="self_attn"))
    assert set(found["layers"]) == {"attention"}
    asked = {"targets": "self_attn", "experts": True}
    for lora, message in [
        ({}, r"lora\.targets is '_proj\$', which matches matrices .* lora\.experts is false"),
        (asked, r"lora\.targets is 'self_attn', which matches no matrix .* lora\.experts is true"),
    ]:
        with pytest.raises(LoraError, match=message):
            abstract_adapters(config, Lora(rank=2, alpha=4, **lora))
    with pytest.raises(LoraError, match="this model has no experts. Set it to false"):
        abstract_adapters(tiny(), ADAPTED)
    with pytest.raises(ValueError, match="adapters of experts have no dropout"):
        Lora(rank=2, alpha=4, experts=True, dropout=0.1)


@pytest.mark.parametrize("base", ["int8", "nf4"])
def test_experts_of_a_quantised_base_are_rounded_in_blocks_of_their_inputs(base, tiny):
    pytest.importorskip("qwix", reason="qwix is not installed (the extra `qlora`)")
    config = tiny(mixture=MIXTURES["normalized"], embed=64)
    p = {"layers": {"experts": {k: v[None] for k, v in kernels(config).items()}}}
    quantized = quantize(p, base)["layers"]["experts"]
    assert quantized["router"] is p["layers"]["experts"]["router"]
    assert quantized["up"].scale.shape == (1, 8, 1, config.mlp)
    found = dequantize({"layers": {"experts": quantized}})["layers"]["experts"]
    levels = {"int8": 127, "nf4": 5}[base]
    for name in ("gate", "up", "down"):
        exact = p["layers"]["experts"][name]
        most = np.abs(exact).max(axis=2, keepdims=True)
        error = np.abs(np.asarray(found[name]) - exact)
        assert 0 < error.max() and (error <= most / levels).all(), name
