"""Layers that differ in their heads: several stacks, and the same function in every form."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from selm_jax.models.cache import empty_cache
from selm_jax.models.config import Heads, LayerKind, Proportional, Rope, UnsupportedModel
from selm_jax.models.decoder import Decoder, abstract_adapters, abstract_params
from selm_jax.models.lora import Lora, init, merge
from selm_jax.models.stacked import stack, unstack
from selm_jax.objectives.build import build_objective
from selm_jax.parallel.mesh import decode_mesh, make_mesh
from selm_jax.parallel.rules import TRAINING, shardings
from selm_jax.policy.weights import Weights
from selm_jax.rollout.engine import Engine
from selm_jax.rollout.parameters import decoding_params, decoding_shardings
from selm_jax.rollout.requests import Request
from selm_jax.rollout.sampling import Sampling
from selm_jax.training.optimizer import optimizer
from selm_jax.training.state import TrainState
from selm_jax.training.update import make_update

NARROW = LayerKind(Rope(1e4), 5)
WIDE = LayerKind(Rope(1e4, Proportional(0.5)), None, Heads(4, 16, True))
TOKENS = np.random.default_rng(0).integers(0, 96, (2, 16)).astype(np.int32)


@pytest.fixture
def config(tiny):
    return tiny(kinds=(NARROW, WIDE) * 2, value_norm=True, layer_scale=True)


def test_kinds_repeat_after_a_cycle(tiny):
    """The slow way: the least shift by whole cycles that leaves the list as it is."""
    for kinds, cycle in (
        ([NARROW], 1),
        ([WIDE] * 3, 1),
        ([NARROW, WIDE] * 3, 2),
        ([NARROW, NARROW, WIDE] * 2, 3),
        ([NARROW, WIDE, NARROW], 3),
        ([NARROW, WIDE, NARROW, WIDE, NARROW], 5),
        ([NARROW, LayerKind(Rope(9.0)), WIDE, NARROW, NARROW, WIDE], 6),
    ):
        assert tiny(kinds=tuple(kinds)).cycle == cycle


def test_heads_of_a_layer_have_to_fit_like_those_of_a_model(tiny):
    for heads, message in (
        (Heads(3, 16, False), "4 attention heads cannot share 3"),
        (Heads(2, 15, False), "head_dim is 15"),
    ):
        with pytest.raises(UnsupportedModel, match=message):
            tiny(kinds=(NARROW, LayerKind(Rope(1e4), heads=heads)))


def test_stacks_are_the_separate_layers(config, random_params):
    params = random_params(config)
    separate = unstack(params)
    own = jax.eval_shape(Decoder(config, scan=False).init, jax.random.key(0), TOKENS, TOKENS)
    assert jax.tree.map(jnp.shape, separate) == jax.tree.map(jnp.shape, nn.unbox(own["params"]))
    jax.tree.map(np.testing.assert_array_equal, stack(separate, config.cycle), params)
    for i in range(4):
        found = separate[f"layer_{i}"]["attention"]["q"]
        np.testing.assert_array_equal(
            found, params["layers"][f"{i % 2}_of_2"]["attention"]["q"][i // 2]
        )
    assert "v" in separate["layer_2"]["attention"] and "v" not in separate["layer_3"]["attention"]


def test_scanned_and_unrolled_layers_have_one_value_and_gradient(config, random_params):
    params, positions = random_params(config), np.broadcast_to(np.arange(16), (2, 16))

    def value_and_gradient(decoder, params):
        def loss(params):
            hidden, _ = decoder.apply({"params": params}, TOKENS, positions)
            return jnp.sum(hidden * jnp.sin(jnp.arange(hidden.size)).reshape(hidden.shape))

        return jax.jit(jax.value_and_grad(loss))(params)

    value, grads = value_and_gradient(Decoder(config, remat="full"), params)
    expected, theirs = value_and_gradient(Decoder(config, scan=False), unstack(params))
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3)
    jax.tree.map(close, unstack(grads), theirs)


@pytest.mark.parametrize("scan", [True, False])
def test_prefill_and_cached_steps_are_one_forward_pass(scan, config, random_params):
    decoder, params = Decoder(config, scan=scan), random_params(config)
    params = params if scan else unstack(params)
    run = jax.jit(lambda *args: decoder.apply({"params": params}, *args))
    positions = np.broadcast_to(np.arange(16), (2, 16))
    full, _ = run(TOKENS, positions)

    def empty(capacity):
        cache = empty_cache(config, 2, capacity)
        if not scan:
            return cache
        return tuple(jax.tree.map(lambda *x: jnp.stack(x), *cache[i::2]) for i in range(2))

    none, start = None, jnp.zeros(2, jnp.int32)
    first, cache = run(TOKENS[:, :9], positions[:, :9], none, empty(9), start)
    np.testing.assert_allclose(first, full[:, :9], atol=2e-5)
    cache = jax.tree.map(lambda to, x: to.at[..., :9, :].set(x), empty(20), cache)
    for t in range(9, 16):
        at = np.full((2, 1), t)
        found, cache = run(TOKENS[:, t : t + 1], at, none, cache, at[:, 0])
        np.testing.assert_allclose(found[:, 0], full[:, t], atol=2e-5)


def test_adapters_and_merged_parameters_are_one_function(config, random_params):
    """Layers whose values are their keys have no adapter for values."""
    of_values = nn.unbox(abstract_adapters(config, Lora(2, 3.0, targets="v_proj")))
    assert set(of_values["layers"]) == {"0_of_2"}
    lora, params = Lora(2, 3.0), random_params(config)
    adapters = init(nn.unbox(abstract_adapters(config, lora)), jax.random.key(0))
    adapters = jax.tree.map(
        lambda x: x + 0.1 * jnp.cos(jnp.arange(x.size)).reshape(x.shape), adapters
    )
    positions = np.broadcast_to(np.arange(16), (2, 16))
    apart = jax.jit(Decoder(config, lora=lora).apply)
    found, _ = apart({"params": params, "lora": adapters}, TOKENS, positions)
    plain = jax.jit(Decoder(config).apply)
    expected, _ = plain({"params": merge(params, adapters, lora)}, TOKENS, positions)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(plain({"params": params}, TOKENS, positions)[0] - expected).max() > 0.1


def test_the_scale_of_a_layer_is_never_trained(config, random_params):
    """Neither its gradient nor weight decay moves it, as in transformers, where it is a buffer."""
    step = optimizer("adamw", b1=0.9, b2=0.99, eps=1e-3, weight_decay=0.1)
    update = make_update(
        Decoder(config), build_objective("selm", beta=0.1, alpha=0.2), step, chunk=8
    )
    params = random_params(config)
    gradients = jax.tree.map(jnp.ones_like, params)
    state = TrainState(0, jax.tree.map(jnp.copy, params), step.init(params))
    state, metrics = update.apply(state, gradients, {"examples": 1.0, "loss": 0.0}, 1e-2)
    scales = 0
    for path, before in flatten_dict(params).items():
        after = flatten_dict(state.params)[path]
        assert bool(np.any(before != after)) == (path[-1] != "layer_scale")
        scales += (path[-1] == "layer_scale") * before.size
    assert scales == 4
    every = sum(x.size for x in jax.tree.leaves(params))
    assert float(metrics["grad_norm"]) == pytest.approx((every - scales) ** 0.5)
    assert optax.tree.norm(gradients) == pytest.approx(every**0.5)


@pytest.mark.parametrize("weights", ["full", "int8"])
def test_on_a_mesh_both_forms_are_the_same_numbers(weights, config, random_params):
    if weights == "int8":
        pytest.importorskip("qwix", reason="qwix is not installed (the extra `qlora`)")
    mesh = make_mesh((1, 2, 2), jax.devices()[:4])
    params = random_params(config)
    on_mesh = jax.device_put(params, shardings(abstract_params(config), mesh, TRAINING))
    where = decoding_shardings(config, decode_mesh(mesh, 2), weights)
    found = decoding_params(on_mesh, jnp.float32, where, weights)
    alone = decoding_params(params, jnp.float32, weights=weights)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), found, alone)
    if weights == "full":
        assert found["layer_1"]["attention"]["k"].sharding.spec[1] == "tensor"
        both = Weights(
            lambda: on_mesh, config, dtype=jnp.float32, mesh=mesh, decode_mesh=decode_mesh(mesh, 2)
        )
        jax.tree.map(np.testing.assert_array_equal, both.to_answer(), unstack(params))
        jax.tree.map(np.testing.assert_array_equal, both.to_score(), params)


def test_greedy_answers_are_those_of_full_forwards(config, random_params, all_logits):
    params = random_params(config)
    engine = Engine(Decoder(config, scan=False), Sampling(), 4, 16, 6, (95,))
    prompts = [tuple(int(t) for t in TOKENS[0, :n]) for n in (3, 16, 7, 11, 5)]
    requests = [Request(i, prompt, greedy=1, samples=0) for i, prompt in enumerate(prompts)]
    found = engine.generate(decoding_params(params, jnp.float32), requests, seed=1, iteration=1)
    run = jax.jit(partial(all_logits, Decoder(config)))
    for response in found:
        whole = (*prompts[response.index], *response.tokens)
        scores = run(params, np.array([whole + (0,) * (22 - len(whole))]))[0]
        first = len(prompts[response.index]) - 1
        expected = np.argmax(scores[first : first + len(response.tokens)], -1)
        assert tuple(map(int, expected)) == response.tokens
