"""Chunked log-probabilities against the plain form that holds all logits."""

from __future__ import annotations

import re
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from selm_jax.objectives.logprobs import _chunk, token_logprobs, token_statistics
from selm_jax.parallel.mesh import make_mesh
from selm_jax.plan.topology import target

ROWS, SCORED, EMBED, VOCAB = 3, 12, 16, 50


def plain(hidden, targets, unembedding, cap=None):
    logits = jnp.einsum("rpd,vd->rpv", hidden, unembedding, precision="highest")
    if cap is not None:
        logits = cap * jnp.tanh(logits / cap)
    table = jax.nn.log_softmax(logits, axis=-1)
    return jnp.take_along_axis(table, targets[..., None], axis=-1)[..., 0]


def inputs(seed: int = 0, dtype=jnp.float32, scale: float = 1.0):
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.normal(size=(ROWS, SCORED, EMBED)) * scale, dtype)
    targets = jnp.asarray(rng.integers(0, VOCAB, (ROWS, SCORED)), jnp.int32)
    unembedding = jnp.asarray(rng.normal(size=(VOCAB, EMBED)), jnp.float32)
    weight = jnp.asarray(rng.normal(size=(ROWS, SCORED)), jnp.float32)
    return hidden, targets, unembedding, weight


def with_gradients(function, hidden, targets, unembedding, weight):
    value, backward = jax.vjp(lambda h, w: function(h, targets, w), hidden, unembedding)
    return value, *backward(weight)


# 1, dividing, not dividing, all, more than all.
@pytest.mark.parametrize("cap", [None, 2.5])
@pytest.mark.parametrize("chunk", [1, 4, 5, 11, 12, 100])
def test_value_and_gradients_are_those_of_the_plain_form(chunk, cap):
    h, y, w, g = inputs()
    got = with_gradients(partial(token_logprobs, chunk=chunk, cap=cap), h, y, w, g)
    for a, b in zip(got, with_gradients(partial(plain, cap=cap), h, y, w, g), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 5, 12])
def test_cotangents_of_tokens_and_of_examples_reach_the_gradient(chunk):
    """A tiling of the vocabulary that takes them for 1 is wrong by orders of magnitude."""
    h, y, w, _ = inputs(3)
    of_example = jnp.array([1e-4, -3.0, 2e3])
    of_token = jnp.linspace(-1.0, 4.0, SCORED)

    def loss(function, weight):
        return lambda h, w: jnp.sum(of_example * jnp.sum(weight * function(h, y, w), axis=-1))

    for weight in (jnp.ones(SCORED), of_token):  # sums over tokens, then weighted tokens
        found = jax.grad(loss(partial(token_logprobs, chunk=chunk), weight), (0, 1))(h, w)
        expected = jax.grad(loss(plain, weight), (0, 1))(h, w)
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6 * np.abs(b).max())
        for row in range(ROWS):  # the small one is not lost beside the large one
            np.testing.assert_allclose(found[0][row], expected[0][row], rtol=1e-4, atol=1e-8)


def test_a_target_alone_has_the_gradient_of_cross_entropy():
    """d/dh log p(y) = w_y - sum_v p_v w_v, by hand."""
    h, y, w, _ = inputs(1)
    g = jnp.zeros((ROWS, SCORED)).at[1, 7].set(1.0)
    _, d_h, d_w = with_gradients(partial(token_logprobs, chunk=5), h, y, w, g)
    p = jax.nn.softmax(w @ h[1, 7])
    np.testing.assert_allclose(d_h[1, 7], w[y[1, 7]] - p @ w, atol=1e-5)
    np.testing.assert_allclose(d_w, jnp.outer(jnp.eye(VOCAB)[y[1, 7]] - p, h[1, 7]), atol=1e-5)
    assert jnp.abs(d_h.at[1, 7].set(0)).max() == 0


def test_extreme_logits_stay_finite_and_exact():
    h, y, w, g = inputs(2, scale=300.0)
    got = with_gradients(partial(token_logprobs, chunk=5), h, y, w, g)
    assert all(np.isfinite(x).all() for x in got)
    np.testing.assert_allclose(got[0], plain(h, y, w), rtol=1e-5)
    assert (got[0] <= 0).all()


def test_bfloat16_hidden_states_are_summed_in_float32():
    """The values are those of the rounded inputs in float32, not of bfloat16 arithmetic."""
    h, y, w, g = inputs(3, jnp.bfloat16, scale=3.0)
    value, d_h, d_w = with_gradients(partial(token_logprobs, chunk=5), h, y, w, g)
    assert (value.dtype, d_h.dtype, d_w.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
    rounded = w.astype(jnp.bfloat16).astype(jnp.float32)
    exact, e_h, e_w = with_gradients(plain, h.astype(jnp.float32), y, rounded, g)
    np.testing.assert_allclose(value, exact, rtol=1e-5, atol=1e-4)
    half = plain(h, y, w.astype(jnp.bfloat16))
    assert np.abs(half.astype(jnp.float32) - exact).max() > 1e-2  # what would have been lost
    np.testing.assert_allclose(d_h.astype(jnp.float32), e_h, atol=0.02 * np.abs(e_h).max())
    np.testing.assert_allclose(d_w, e_w, atol=0.02 * np.abs(e_w).max())


def test_padding_up_to_whole_chunks_gets_no_gradient_and_changes_none():
    h, y, w, g = inputs(4)
    _, d_h, d_w = with_gradients(partial(token_logprobs, chunk=12), h, y, w, g)
    _, c_h, c_w = with_gradients(partial(token_logprobs, chunk=7), h, y, w, g)
    np.testing.assert_allclose(c_h, d_h, atol=1e-6)
    np.testing.assert_allclose(c_w, d_w, atol=1e-5)


def sizes(jaxpr) -> list[int]:
    """The size of every array in a program, inner programs included."""
    found = [v.aval.size for v in [*jaxpr.invars, *jaxpr.outvars] if hasattr(v.aval, "size")]
    for equation in jaxpr.eqns:
        found += [v.aval.size for v in equation.outvars if hasattr(v.aval, "size")]
        for value in equation.params.values():
            for inner in value if isinstance(value, list | tuple) else [value]:
                inner = getattr(inner, "jaxpr", inner)
                found += sizes(inner) if hasattr(inner, "eqns") else []
    return found


def test_the_whole_logits_never_exist():
    rows, scored, embed, vocab, chunk = 4, 64, 8, 512, 8
    args = (
        jnp.zeros((rows, scored, embed)), jnp.zeros((rows, scored), jnp.int32),
        jnp.zeros((vocab, embed)), jnp.zeros((rows, scored)),
    )  # fmt: skip

    def largest(function):
        return max(sizes(jax.make_jaxpr(partial(with_gradients, function))(*args).jaxpr))

    assert largest(plain) == rows * scored * vocab  # the test sees what it looks for
    assert largest(partial(token_logprobs, chunk=chunk)) == rows * chunk * vocab


@pytest.mark.parametrize("asked", [1, 7, 32, 128, 256])
def test_chunks_are_as_few_as_asked_for_and_share_the_tokens_evenly(asked):
    """140 tokens were padded to 256, two chunks of 128, and most of the second was computed."""
    for p in range(1, 400):
        chunk = _chunk(asked, jnp.zeros((1, p), jnp.int32), None)
        count = -(-p // chunk)
        assert chunk <= asked and count == -(-p // asked)
        assert count * chunk - p < 8 * count
    assert _chunk(128, jnp.zeros((4, 140), jnp.int32), None) == 72


def test_compiled_memory_is_a_chunks_not_the_batchs():
    rows, scored, embed, vocab = 2, 256, 8, 4096
    args = (
        jnp.zeros((rows, scored, embed)), jnp.zeros((rows, scored), jnp.int32),
        jnp.zeros((vocab, embed)), jnp.zeros((rows, scored)),
    )  # fmt: skip

    def scratch(function):
        compiled = jax.jit(partial(with_gradients, function)).lower(*args).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert scratch(partial(token_logprobs, chunk=16)) < scratch(plain) / 4


def test_a_frozen_unembedding_pays_for_no_gradient():
    h, y, w, g = inputs(5)

    def products(frozen):
        found = partial(token_logprobs, chunk=4, frozen=frozen)
        return str(jax.make_jaxpr(partial(with_gradients, found))(h, y, w, g)).count("dot_general")

    assert products(frozen=True) == products(frozen=False) - 1
    value, d_h, d_w = with_gradients(partial(token_logprobs, chunk=4, frozen=True), h, y, w, g)
    trained = with_gradients(partial(token_logprobs, chunk=4), h, y, w, g)
    np.testing.assert_array_equal(value, trained[0])
    np.testing.assert_array_equal(d_h, trained[1])
    assert not np.any(d_w) and np.any(trained[2])


# --- on a mesh ---------------------------------------------------------------------------------

NAMES = "all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute"
COLLECTIVE = rf"= (?:\(.*?\)|\S+) ({NAMES})(?:-start)?\("


def collectives(hlo: str) -> tuple[Counter, Counter]:
    """The collectives of a compiled program by name: outside of its loops, and inside of them."""
    bodies = dict(
        re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{\n(.*?)^\}", hlo, re.MULTILINE | re.DOTALL)
    )
    calls = {
        name: set(re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", body))
        for name, body in bodies.items()
    }
    looping = set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", hlo))
    while more := set().union(*(calls.get(name, set()) for name in looping)) - looping:
        looping |= more
    outside, inside = Counter(), Counter()
    for name, body in bodies.items():
        (inside if name in looping else outside).update(re.findall(COLLECTIVE, body))
    return outside, inside


def on_mesh(mesh):
    """Returns the shardings of hidden states, targets, unembedding and token weights on a mesh."""
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    return rows, rows, NamedSharding(mesh, P("tensor", "fsdp")), rows


@pytest.mark.slow_except("sizes0-2.5", "sizes1-None", "sizes3")
@pytest.mark.parametrize("cap", [None, 2.5])
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 2, 4), (8, 1, 1)])
def test_a_mesh_gives_what_one_device_gives(sizes, cap):
    rng = np.random.default_rng(6)
    args = (
        jnp.asarray(rng.normal(size=(8, 13, 16)), jnp.float32),
        jnp.asarray(rng.integers(0, 52, (8, 13)), jnp.int32),
        jnp.asarray(rng.normal(size=(52, 16)), jnp.float32),
        jnp.asarray(rng.normal(size=(8, 13)), jnp.float32),
    )
    mesh = make_mesh(sizes, jax.devices()[:8])
    placed = tuple(map(jax.device_put, args, on_mesh(mesh)))
    logprobs = partial(token_logprobs, chunk=5, cap=cap)
    alone = jax.jit(partial(with_gradients, logprobs))(*args)
    compiled = jax.jit(partial(with_gradients, partial(logprobs, mesh=mesh))).lower(*placed)
    compiled = compiled.compile()
    for a, b in zip(compiled(*placed), alone, strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
    outside, inside = collectives(compiled.as_text())
    assert outside and not inside

    statistics = partial(token_statistics, chunk=5, cap=cap)
    found = jax.jit(partial(statistics, mesh=mesh))(*placed[:3])
    expected = jax.jit(statistics)(*args[:3])
    np.testing.assert_allclose(found.logprob, expected.logprob, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.entropy, expected.entropy, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found.collision, expected.collision, rtol=1e-5, atol=1e-5)
    each = [plain(args[0], jnp.full_like(args[1], v), args[2], cap) for v in range(52)]
    squares = jax.nn.logsumexp(2 * jnp.stack(each), axis=0)
    np.testing.assert_allclose(expected.collision, squares, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(found.likeliest, expected.likeliest)
    assert 0 < found.likeliest.sum() < found.likeliest.size


def test_where_only_rows_are_cut_values_are_equal_to_the_bit():
    h, y, w, g = inputs(7)
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    found = with_gradients(partial(token_logprobs, chunk=5, mesh=mesh), h, y, w, g)
    for a, b in zip(
        found, with_gradients(partial(token_logprobs, chunk=5), h, y, w, g), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.libtpu
def test_on_tpus_the_unembedding_is_gathered_once_and_never_in_a_loop():
    """Llama-3-8B's head on v5e:4x8, rows of 3,200, at the default setting of the chunk."""
    mesh = make_mesh((1, 32, 1), target("v5e:4x8").devices)
    shapes = (
        ((32, 3200, 4096), jnp.bfloat16),
        ((32, 3200), jnp.int32),
        ((128256, 4096), jnp.float32),
    )
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        for (shape, dtype), where in zip(
            (*shapes, ((32, 3200), jnp.float32)), on_mesh(mesh), strict=True
        )
    ]
    where = on_mesh(mesh)
    both = partial(with_gradients, partial(token_logprobs, chunk=32, mesh=mesh))
    compiled = jax.jit(both, out_shardings=(where[0], where[0], where[2])).lower(*args).compile()
    outside, inside = collectives(compiled.as_text())
    assert not inside
    # Forward and backward share one gather, and the gradient is summed once.
    assert outside == {"all-gather": 1, "reduce-scatter": 1}
