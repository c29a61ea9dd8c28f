"""The decoder against transformers, against itself in its other forms, and its facts one by one."""

from __future__ import annotations

import dataclasses
import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.models.decoder import (
    REMAT,
    Decoder,
    LayerCache,
    abstract_params,
    parameter_count,
    unstack,
)
from selm_jax.models.families import DecoderConfig, UnsupportedModel, from_hf, read_config, to_hf
from selm_jax.models.linear import project
from selm_jax.weights.huggingface import load, save

FAMILIES = {
    "llama": {},
    "llama, tied": {"tied": True, "rope_theta": 5e5, "norm_eps": 1e-3},
    "llama, one kv head, wide heads": {"kv_heads": 1, "head_dim": 16},
    "mistral": {"window": 37},
    "mistral, no window": {"architecture": "MistralForCausalLM", "kv_heads": 4},
}


def some_tokens(rows: int, time: int, vocab: int = 96, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab, (rows, time)).astype(np.int32)


def causal(rows: int, time: int, window: int | None = None):
    """Positions and mask of rows that are one sequence each."""
    at = jnp.arange(time)
    ago = at[:, None] - at
    mask = (ago >= 0) & (ago < (window or time))
    return jnp.broadcast_to(at, (rows, time)), jnp.broadcast_to(mask, (rows, time, time))


@cache
def apply(decoder: Decoder):
    """apply(decoder)(params, tokens, positions, mask, ...) -> hidden, cache"""
    return jax.jit(lambda params, *args: decoder.apply({"params": params}, *args))


# --- the same function as transformers ---------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_transformers_gives_the_same_logits(family, tiny, all_logits, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = tiny(**FAMILIES[family])
    torch.manual_seed(0)
    kind = "Mistral" if config.architecture.startswith("Mistral") else "Llama"
    made = getattr(transformers, f"{kind}Config")(
        **to_hf(config) | {"attn_implementation": "eager"}
    )
    theirs = transformers.AutoModelForCausalLM.from_config(made).eval()
    with torch.no_grad():
        for p in theirs.parameters():  # its own start values are nearly a constant function
            p.add_(torch.randn_like(p) * 0.2)
    theirs.save_pretrained(tmp_path)

    found = read_config(tmp_path)
    assert found == config
    tokens = some_tokens(2, 1100)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    ours = jax.jit(partial(all_logits, Decoder(found)))(load(tmp_path, found), tokens)
    assert np.abs(expected[:, 1000:]).max() > 1
    np.testing.assert_allclose(ours, expected, atol=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_what_is_saved(family, tiny, random_params, all_logits, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = tiny(**FAMILIES[family])
    params = random_params(config)
    save(params, config, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(to_hf(config)))
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    tokens = some_tokens(2, 80)
    with torch.no_grad():
        expected = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    ours = jax.jit(partial(all_logits, Decoder(config)))(params, tokens)
    np.testing.assert_allclose(ours, expected, atol=2e-4)


# --- what must not matter ----------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_irrelevant(window, side, tiny, random_params):
    config = tiny(window=window)
    params, run = random_params(config), apply(Decoder(config))
    tokens = some_tokens(2, 12)
    alone, _ = run(params, tokens, *causal(2, 12, window))

    def padded(seed):
        at = slice(7, 19) if side == "left" else slice(0, 12)
        wide, positions = some_tokens(2, 19, seed=seed), some_tokens(2, 19, seed=seed + 1)
        mask = np.random.default_rng(seed).random((2, 19, 19)) < 0.5
        mask[:, at] = False
        wide[:, at] = tokens
        positions[:, at], mask[:, at, at] = causal(2, 12, window)
        hidden, _ = run(params, wide, positions, mask)
        return hidden[:, at]

    np.testing.assert_allclose(padded(1), alone, atol=2e-5)
    np.testing.assert_array_equal(padded(1), padded(3))


def test_a_token_that_sees_nothing_is_finite(tiny, random_params):
    config = tiny()
    tokens, positions = some_tokens(1, 4), jnp.zeros((1, 4), jnp.int32)
    nothing = jnp.zeros((1, 4, 4), bool)
    hidden, _ = apply(Decoder(config))(random_params(config), tokens, positions, nothing)
    assert np.isfinite(hidden).all()


def test_positions_are_relative(tiny, random_params):
    config = tiny()
    run = partial(apply(Decoder(config)), random_params(config))
    tokens, (positions, mask) = some_tokens(2, 16), causal(2, 16)
    near, _ = run(tokens, positions, mask)
    far, _ = run(tokens, positions + 700, mask)
    np.testing.assert_allclose(near, far, atol=5e-4)
    stretched, _ = run(tokens, positions * 2, mask)
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
    full, _ = run(tokens, *causal(3, 14, window))

    def empty(capacity):
        junk = jnp.full((config.layers, 3, config.kv_heads, capacity, config.head_dim), 9.0)
        whole = LayerCache(junk, junk)
        return whole if scan else tuple(jax.tree.map(lambda x: x[0], whole) for _ in range(2))

    first = causal(3, 9, window)
    _, cache = run(tokens[:, :9], *first, empty(9), jnp.zeros(3, jnp.int32))
    cache = jax.tree.map(
        lambda big, small: big.at[..., : small.shape[-2], :].set(small), empty(capacity), cache
    )
    index = lengths.copy()
    for count in (3, 1, 1):
        positions = index[:, None] + np.arange(count)
        new = np.take_along_axis(tokens, positions, axis=1)
        ago = positions[:, :, None] - np.arange(capacity)
        mask = (ago >= 0) & (ago < (window or capacity))
        hidden, cache = run(new, positions, mask, cache, jnp.array(index))
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

# For every field a value other than TINY's. `max_positions` and `architecture` are for the way out
# to config.json alone; the architecture says too whether there may be a window.
OTHER = {
    "vocab_size": 80, "embed": 40, "layers": 3, "heads": 2, "kv_heads": 4, "head_dim": 12,
    "mlp": 48, "norm_eps": 0.1, "rope_theta": 100.0, "tied": True, "window": 3,
    "max_positions": 99, "architecture": "MistralForCausalLM",
}  # fmt: skip
FOR_THE_WAY_OUT = {"max_positions", "architecture"}


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(DecoderConfig)])
def test_no_field_is_decorative(field, tiny, random_params, all_logits):
    base = tiny()
    other = dataclasses.replace(base, **{field: OTHER[field]})

    def shapes(config):
        return jax.tree.map(jnp.shape, random_params(config))

    if shapes(other) != shapes(base):  # other parameters: `load` would not take the old ones
        assert field not in FOR_THE_WAY_OUT
        return

    def logits(config):
        return jax.jit(partial(all_logits, Decoder(config)))(random_params(base), tokens)

    tokens = some_tokens(1, 12, vocab=80)
    difference = np.abs(logits(other) - logits(base)).max()
    if field in FOR_THE_WAY_OUT:
        assert difference == 0 and to_hf(other) != to_hf(base)
    else:  # the window too: the decoder gets it by way of the mask
        assert difference > 1e-2


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


# --- config.json -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_way_out_and_back_in(family, tiny):
    config = tiny(**FAMILIES[family])
    assert from_hf(to_hf(config)) == config
    assert from_hf(json.loads(json.dumps(to_hf(config)))) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma"}, "model_type is 'gemma'"),
        ({"logit_soft_cap": 30.0}, "logit_soft_cap"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"mlp_bias": True}, "mlp_bias is True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}}, "llama3"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"sliding_window": 128}, "sliding_window is 128"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_what_the_decoder_cannot_express_is_an_error_that_names_it(changes, message, tiny):
    with pytest.raises(UnsupportedModel, match=message):
        from_hf(to_hf(tiny()) | changes)


def test_a_missing_key_is_named_with_the_file(tiny, tmp_path):
    hf = to_hf(tiny())
    del hf["intermediate_size"]
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(UnsupportedModel, match=r"config\.json: key 'intermediate_size' is missing"):
        read_config(tmp_path)


def test_defaults_are_those_of_transformers(tiny):
    """A key that config.json leaves out has the value that transformers gives it."""
    transformers = pytest.importorskip("transformers")
    for kind in ("Llama", "Mistral"):
        hf = to_hf(tiny(architecture=f"{kind}ForCausalLM", heads=8, kv_heads=8, embed=64))
        for key in (
            "sliding_window",
            "head_dim",
            "rope_theta",
            "tie_word_embeddings",
            "hidden_act",
        ):
            hf.pop(key, None)
        theirs = getattr(transformers, f"{kind}Config")(**hf)
        assert from_hf(hf) == from_hf({k: v for k, v in theirs.to_dict().items() if v is not None})
