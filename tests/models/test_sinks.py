"""Attention sinks: their definition, every back end, and the gradients of a whole gpt-oss."""

from __future__ import annotations

import importlib.util
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.models import attention_tpu, decode_tpu
from selm_jax.models.attention import _chosen, attention, einsum
from selm_jax.models.decoder import Decoder, logits
from selm_jax.models.families import read_config
from selm_jax.models.sight import Sight
from selm_jax.parallel.mesh import make_mesh
from selm_jax.weights.huggingface import load, to_hf_tensors

FOLDER = Path(__file__).parents[1] / "golden" / "families" / "gpt-oss"
_spec = importlib.util.spec_from_file_location("golden_families", FOLDER.parents[1] / "families.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)


def trees(rows: int, time: int) -> Sight:
    """A prompt and two responses in each row, and padding; the last row is padding alone."""
    position, end = np.zeros((2, rows, time), np.int32)
    prompt, response = time // 2, time // 5
    position[:-1, :prompt], end[:-1, :prompt] = np.arange(prompt), prompt + 2 * response
    for first in (prompt, prompt + response):
        position[:-1, first : first + response] = prompt + np.arange(response)
        end[:-1, first : first + response] = first + response
    return Sight(jnp.asarray(position), jnp.asarray(position), jnp.asarray(end))


def some(rows: int, time: int, heads: int, k: int, h: int) -> list[np.ndarray]:
    """Random queries, keys, values, sinks of all sizes, and a gradient."""
    rng = np.random.default_rng(0)
    query, gradient = rng.normal(size=(2, rows, time, heads, h))
    keys, values = rng.normal(size=(2, rows, time, k, h))
    sinks = np.linspace(-9, 9, heads)
    return [np.float32(x) for x in (query, keys, values, sinks, gradient)]


def by_definition(query, keys, values, sinks, mask, scale):
    """One query and one head at a time, in float64."""
    query, keys, values, sinks = (np.float64(x) for x in (query, keys, values, sinks))
    found = np.zeros_like(query)
    group = query.shape[2] // keys.shape[2]
    for r, t, head in np.ndindex(query.shape[:3]):
        seen = np.flatnonzero(mask[r, t])
        scores = scale * keys[r, seen, head // group] @ query[r, t, head]
        shares = np.exp(scores) / (np.exp(scores).sum() + np.exp(sinks[head]))
        found[r, t, head] = shares @ values[r, seen, head // group]
    return found


def test_values_and_the_sinks_gradient_are_those_of_the_definition():
    sight = trees(2, 12)._replace(window=jnp.int32(5))
    *given, gradient = some(2, 12, 4, 2, 8)
    mask = np.asarray(sight.mask())
    gradient = gradient * mask.any(-1)[:, :, None, None]
    value, backward = jax.vjp(lambda s: einsum(*given[:3], sight, 0.3, None, s), given[3])
    expected = by_definition(*given, mask, 0.3)
    sees = mask.any(-1)
    np.testing.assert_allclose(value[sees], expected[sees], rtol=1e-5, atol=1e-6)

    def total(sinks):
        return np.sum(gradient * by_definition(*given[:3], sinks, mask, 0.3))

    steps = 1e-5 * np.eye(4)
    slopes = [(total(given[3] + s) - total(given[3] - s)) / 2e-5 for s in steps]
    assert np.abs(slopes).max() > 0.1
    np.testing.assert_allclose(backward(gradient)[0], slopes, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("back_end", "mesh"), [("blocks", None), ("blocks", (2, 2, 2)), ("kernel", None)]
)
def test_every_back_end_gives_the_einsums_values_and_gradients(back_end, mesh, monkeypatch):
    monkeypatch.setattr(attention_tpu, "_LARGEST", 128)
    sight = trees(4, 300)._replace(window=jnp.int32(90))
    *given, gradient = some(4, 300, 4, 2, 16)
    sees = np.asarray(sight.mask().any(-1))[:, :, None, None]
    mesh = None if mesh is None else make_mesh(mesh)

    def of(back_end, mesh):
        def run(query, keys, values, sinks):
            return attention(
                query, keys, values, sight, scale=0.25, cap=8.0, sinks=sinks, back_end=back_end,
                mesh=mesh,
            )  # fmt: skip

        value, backward = jax.vjp(jax.jit(run), *given)
        return jnp.where(sees, value, 0), *backward(gradient * sees)

    for a, b in zip(of(back_end, mesh), of("einsum", None), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mesh", [None, (2, 2, 2)])
def test_a_decoding_step_of_the_kernel_has_sinks(mesh, monkeypatch):
    """Slots see one entry, parts of blocks and whole ones; a window hides a part of the last."""
    monkeypatch.setattr(decode_tpu, "_LONGEST", 128)
    query, keys, values, sinks, _ = some(4, 300, 4, 2, 16)
    place = jnp.asarray([[0], [76], [128], [299]])
    sight = Sight(place, jnp.arange(300)[None], place=place, window=jnp.int32(200))
    given, mask = (query[:, :1], keys, values, sinks), np.asarray(sight.mask())
    mesh = None if mesh is None else make_mesh(mesh)

    @jax.jit
    def found(query, keys, values, sinks):
        return attention(
            query, keys, values, sight, scale=0.3, sinks=sinks, back_end="kernel", mesh=mesh
        )

    expected = by_definition(*given, mask, 0.3)
    np.testing.assert_allclose(found(*given), expected, rtol=1e-4, atol=1e-5)
    without = by_definition(query[:, :1], keys, values, np.full(4, -99.0), mask, 0.3)
    assert np.abs(expected - without).max() > 0.1


def test_a_decoding_step_on_a_tpu_takes_the_kernel():
    at = jnp.arange(1)[None]
    assert _chosen("auto", Sight(at, at, place=at), "tpu") == "kernel"


@pytest.mark.slow
def test_gradients_of_a_whole_model_are_those_of_torch():
    torch = pytest.importorskip("torch")
    tokens = np.maximum(golden.tokens()[:, :60], 1)  # torch gives the padding's token no gradient
    wave = np.sin(np.arange(2 * 60 * 96)).reshape(2, 60, 96).astype(np.float32)
    model = golden.read(FOLDER)
    (model(torch.tensor(tokens, dtype=torch.long)).logits * torch.tensor(wave)).sum().backward()
    theirs = {name: p.grad.numpy() for name, p in model.named_parameters()}

    config = read_config(FOLDER)
    positions = np.broadcast_to(np.arange(60), (2, 60))
    decoder = Decoder(config, back_end="blocks")

    def total(params):
        hidden, _ = decoder.apply({"params": params}, tokens, positions)
        return jnp.sum(logits(config, params, hidden) * wave)

    ours = dict(to_hf_tensors(jax.jit(jax.grad(total))(load(FOLDER, config)), config))
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        assert np.linalg.norm(expected) > 1e-2, name
        near = partial(np.testing.assert_allclose, rtol=1e-3, err_msg=name)
        near(ours[name], expected, atol=1e-4 * np.abs(expected).max())
