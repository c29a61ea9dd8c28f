"""Adapters change nothing before training, add one product after it, and alone get gradients."""

from __future__ import annotations

import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from selm_jax.models.decoder import Decoder, abstract_adapters
from selm_jax.models.lora import TARGETS, Lora, LoraError, init, merge
from selm_jax.models.quantize import dequantize, quantize

LORAS = {
    "all": Lora(3, 6.0),
    "attention": Lora(2, 1.0, targets=r"self_attn\.[qv]_proj"),
    "rslora": Lora(4, 6.0, targets="down_proj|o_proj", rslora=True),
}


def adapters_of(config, lora, seed=0, b=True):
    """New adapters; with `b`, B is not zero, as after training."""
    found = init(nn.unbox(abstract_adapters(config, lora)), jax.random.key(seed))
    if not b:
        return found
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + rng.normal(0, 0.2, x.shape).astype(np.float32), found)


def hidden(decoder, params, adapters=None, key=None, seed=0):
    tokens = np.random.default_rng(seed).integers(0, 96, (2, 12)).astype(np.int32)
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))
    variables = {"params": params} | ({} if adapters is None else {"lora": adapters})
    rngs = None if key is None else {"dropout": key}
    apply = jax.jit(partial(decoder.apply, rngs=rngs))
    return apply(variables, tokens, positions)[0]


@pytest.mark.parametrize("name", LORAS)
def test_fresh_adapters_change_nothing(name, tiny, random_params):
    config, lora = tiny(), LORAS[name]
    params = random_params(config)
    with_them = hidden(Decoder(config, lora=lora), params, adapters_of(config, lora, b=False))
    np.testing.assert_array_equal(with_them, hidden(Decoder(config), params))


def test_only_a_quantised_base_needs_qwix(tiny, random_params, monkeypatch):
    params = random_params(tiny())
    monkeypatch.setitem(sys.modules, "qwix", None)  # what is not installed cannot be imported
    with pytest.raises(LoraError, match="need the package qwix"):
        quantize(params, "nf4")
    jax.tree.map(np.testing.assert_array_equal, jax.jit(dequantize)(params), params)


@pytest.mark.slow_except("all-full", "attention-none", "rslora-none")
@pytest.mark.parametrize("remat", ["none", "full"])
@pytest.mark.parametrize("name", LORAS)
def test_adapters_and_merged_parameters_are_one_function_with_one_gradient(
    name, remat, tiny, random_params
):
    config, lora = tiny(), LORAS[name]
    params, adapters = random_params(config), adapters_of(config, LORAS[name])
    weight = jnp.sin(jnp.arange(2 * 12 * config.embed)).reshape(2, 12, -1)

    def apart(adapters):
        return jnp.sum(weight * hidden(Decoder(config, remat=remat, lora=lora), params, adapters))

    def merged(adapters):
        return jnp.sum(weight * hidden(Decoder(config), merge(params, adapters, lora)))

    close = partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-4)
    assert abs(merged(adapters) - jnp.sum(weight * hidden(Decoder(config), params))) > 0.1
    both = (jax.jit(jax.value_and_grad(each))(adapters) for each in (apart, merged))
    jax.tree.map(close, *both)


def test_merging_by_hand(tiny, random_params):
    config, lora = tiny(), Lora(3, 6.0, targets="o_proj", rslora=True)
    params, adapters = random_params(config), adapters_of(config, lora)
    found = merge(params, adapters, lora)
    a, b = (adapters["layers"]["attention"][f"o_{half}"] for half in "ab")
    for i in range(config.layers):
        product = np.asarray(a[i]).reshape(-1, 3) @ np.asarray(b[i])
        expected = params["layers"]["attention"]["o"][i] + 6 / np.sqrt(3) * product.reshape(
            4, 8, 32
        )
        np.testing.assert_allclose(found["layers"]["attention"]["o"][i], expected, atol=1e-5)
    changed = [
        path for path, x in flatten_dict(found).items() if (x != flatten_dict(params)[path]).any()
    ]
    assert changed == [("layers", "attention", "o")]


def test_targets_choose_the_kernels(tiny):
    def adapted(targets):
        lora = Lora(1, 1.0, targets=targets)
        paths = flatten_dict(nn.unbox(abstract_adapters(tiny(), lora)))
        return {"/".join(p[1:]).removesuffix("_a") for p in paths if p[-1].endswith("_a")}

    assert adapted("_proj$") == set(TARGETS)
    assert adapted("mlp") == {"mlp/gate", "mlp/up", "mlp/down"}
    assert adapted(r"^self_attn\.(k|v)_proj$") == {"attention/k", "attention/v"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, r"(?s)rank\n.*a whole number from 1 to .*input_value=0,"),
        ({"alpha": -1.0}, r"(?s)alpha\n.*a number above 0 was.*input_value=-1.0,"),
        ({"dropout": 1.0}, r"(?s)dropout\n.*at least 0 and below 1 was.*input_value=1.0,"),
        ({"targets": "w_pack"}, "matches none of the kernels self_attn.q_proj"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Lora(**({"rank": 2, "alpha": 2.0} | changes))


def test_a_starts_as_peft_draws_it_and_b_at_zero(tiny):
    lora = Lora(64, 1.0)
    for path, x in flatten_dict(adapters_of(tiny(embed=64), lora, b=False)).items():
        if path[-1].endswith("_b"):
            assert not x.any()
        else:
            bound = np.prod(x.shape[1:-1]) ** -0.5
            assert 0.98 * bound < np.abs(x).max() <= bound
            assert abs(float(x.std()) / (bound / 3**0.5) - 1) < 0.05  # of a uniform distribution


def test_dropout_is_drawn_by_its_key_and_is_right_on_average(tiny, random_params):
    config, lora = tiny(layers=1), Lora(2, 0.5, dropout=0.5, targets="down_proj")
    decoder = Decoder(config, lora=lora)
    params, adapters = random_params(config), adapters_of(config, lora)
    run = jax.jit(lambda key: hidden(decoder, params, adapters, key))
    one, two = run(jax.random.key(1)), run(jax.random.key(2))
    np.testing.assert_array_equal(one, run(jax.random.key(1)))
    assert np.abs(one - two).max() > 1e-3
    plain = hidden(decoder, params, adapters)
    assert np.abs(plain - one).max() > 1e-3
    # The last norm is not linear, but its input is, in what is dropped: small adapters tell.
    mean = np.mean([run(jax.random.key(i)) for i in range(400)], axis=0)
    assert np.abs(mean - plain).max() < 0.25 * np.abs(one - plain).max()
