"""Every back end of attention against the einsum, whose T x T mask is the oracle."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.models.attention import _chosen, attention, einsum
from selm_jax.models.attention_blocks import blockwise, visits
from selm_jax.models.config import LayerKind, Rope
from selm_jax.models.decoder import REMAT, Decoder, abstract_params
from selm_jax.models.sight import Sight
from selm_jax.models.stacked import unstack
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, place_rows, shardings


def random_trees(rng: np.random.Generator, rows: int, time: int) -> Sight:
    """Rows of prompts with one to four responses, a padded end, and one row of padding alone."""
    position, end = np.zeros((2, rows, time), np.int32)
    for r in range(rows - 1):
        at, stop = 0, time - int(rng.integers(1, time // 4))
        while at < stop:
            prompt = min(int(rng.integers(1, time // 4)), stop - at)
            position[r, at : at + prompt] = np.arange(prompt)
            first, at = at, at + prompt
            for _ in range(rng.integers(1, 5)):
                length = min(int(rng.integers(1, time // 6)), stop - at)
                position[r, at : at + length] = prompt + np.arange(length)
                end[r, at : at + length] = at + length
                at += length
            end[r, first : first + prompt] = at
    return Sight(jnp.asarray(position), jnp.asarray(position), jnp.asarray(end))


def one_tree(rows: int, time: int) -> Sight:
    """A long prompt and two responses: blocks that are seen whole, in part and not at all."""
    prompt, response = time // 2 + 3, time // 4 - 5
    position, end = np.zeros((2, rows, time), np.int32)
    position[:, :prompt] = np.arange(prompt)
    end[:, :prompt] = prompt + 2 * response
    for first in (prompt, prompt + response):
        position[:, first : first + response] = prompt + np.arange(response)
        end[:, first : first + response] = first + response
    return Sight(jnp.asarray(position), jnp.asarray(position), jnp.asarray(end))


def kinds_of_blocks(sight: Sight, block: int) -> dict[str, int]:
    """Counts a causal row's blocks that are skipped, and visited ones that hide something."""
    rows, time = sight.position.shape
    n = -(-time // block)
    mask = np.zeros((rows, n * block, n * block), bool)
    mask[:, :time, :time] = sight.mask()
    cut = mask.reshape(rows, n, block, n, block)
    some, whole = cut.any((2, 4)), cut.all((2, 4))
    below = rows * n * (n + 1) // 2
    return {
        "skipped": int(below - some.sum()), "partial": int((some & ~whole).sum()),
        "whole": int(whole.sum()),
    }  # fmt: skip


# rows, time, query heads, key heads, head_dim, cap, window, block, layout
CASES = [
    (3, 64, 4, 4, 8, None, None, 16, random_trees),
    (3, 64, 4, 2, 8, None, None, 16, random_trees),
    (2, 100, 4, 1, 16, 3.0, None, 16, random_trees),
    (3, 90, 6, 2, 8, None, 7, 32, random_trees),
    (2, 128, 3, 1, 64, 5.0, 40, 16, one_tree),
    (1, 128, 4, 2, 128, None, None, 16, one_tree),
    (2, 48, 2, 1, 256, 20.0, None, 128, random_trees),  # a block longer than the row
]


@pytest.mark.parametrize(
    ("rows", "time", "heads", "k", "h", "cap", "window", "block", "lay"), CASES
)
def test_values_and_gradients_are_the_oracles(rows, time, heads, k, h, cap, window, block, lay):
    rng = np.random.default_rng(0)
    sight = lay(rng, rows, time) if lay is random_trees else lay(rows, time)
    sight = sight._replace(window=None if window is None else jnp.int32(window))
    query, weight = (
        jnp.asarray(rng.normal(size=(rows, time, heads, h)), jnp.float32) for _ in range(2)
    )
    keys, values = (jnp.asarray(rng.normal(size=(rows, time, k, h)), jnp.float32) for _ in range(2))
    # What a query gets that sees nothing is nobody's business: only sighted ones count.
    sees = sight.mask().any(-1)[:, :, None, None]
    assert not sees.all()

    def of(back_end):
        value, backward = jax.vjp(jax.jit(back_end), query, keys, values)
        return jnp.where(sees, value, 0), *backward(weight * sees)

    blocks = partial(blockwise, sight=sight, scale=h**-0.5, cap=cap, block=block)
    found = of(lambda q, x, v: blocks(q, x, v)[0])
    expected = of(lambda q, x, v: einsum(q, x, v, sight, h**-0.5, cap))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_all_kinds_of_blocks_occur_and_the_unseen_are_not_visited():
    rng = np.random.default_rng(0)
    tree = one_tree(2, 192)
    kinds = kinds_of_blocks(tree, 16)
    assert min(kinds.values()) > 0
    assert int(visits(tree, 16).count) == kinds["partial"] + kinds["whole"]
    near = tree._replace(window=jnp.int32(40))
    kinds = kinds_of_blocks(near, 16)
    assert min(kinds.values()) > 0
    # Whether two blocks are near is judged by their least and greatest positions: some are in vain.
    assert kinds["partial"] + kinds["whole"] <= int(visits(near, 16).count) < 0.75 * 2 * 78
    trees = random_trees(rng, 3, 96)
    kinds = kinds_of_blocks(trees, 16)
    assert kinds["skipped"] > kinds["partial"] > 0
    assert int(visits(trees, 16).count) == kinds["partial"] + kinds["whole"]


def test_queries_that_see_nothing_are_finite_and_give_no_gradient():
    sight = Sight(*[jnp.zeros((1, 32), jnp.int32)] * 3)
    x = jnp.ones((1, 32, 2, 8))
    value, backward = jax.vjp(lambda q, k, v: blockwise(q, k, v, sight, 1.0, 2.0, 16)[0], x, x, x)
    assert not np.any(value)
    assert all(not np.any(d) for d in backward(x))


def test_without_ends_every_later_token_sees_each_one():
    rng = np.random.default_rng(1)
    q, k, v = (jnp.asarray(rng.normal(size=(2, 40, 2, 8)), jnp.float32) for _ in range(3))
    at = jnp.broadcast_to(jnp.arange(40), (2, 40))
    found, _ = blockwise(q, k, v, Sight(at, at), 0.3, None, 16)
    np.testing.assert_allclose(found, einsum(q, k, v, Sight(at, at), 0.3), atol=1e-5)


def test_long_rows_take_blocks_and_short_ones_do_not():
    def loops(time, **how):
        at = jnp.broadcast_to(jnp.arange(time), (1, time))
        x = jnp.ones((1, time, 2, 8))
        jaxpr = jax.make_jaxpr(lambda x: attention(x, x, x, Sight(at, at), scale=1.0, **how))(x)
        return "while" in str(jaxpr)

    assert loops(1024) and not loops(128)
    assert not loops(1024, back_end="einsum") and loops(128, back_end="blocks")


@pytest.mark.parametrize(
    ("platform", "time", "decoding", "name"),
    [
        ("tpu", 1024, False, "kernel"),
        ("tpu", 1023, False, "einsum"),
        ("tpu", 1, True, "kernel"),
        ("tpu", 2, True, "einsum"),
        ("gpu", 1024, False, "blocks"),
        ("gpu", 1, True, "einsum"),
        ("cpu", 512, False, "blocks"),
        ("cpu", 1, True, "einsum"),
    ],
)
def test_auto_chooses_by_platform_and_shape(platform, time, decoding, name):
    at = jnp.arange(time)[None]
    assert _chosen("auto", Sight(at, at, place=at if decoding else None), platform) == name


# --- in the decoder ----------------------------------------------------------------------------

ROWS, TIME = 8, 200

GEMMA = {
    "kinds": (LayerKind(Rope(1e4), 24), LayerKind(Rope(1e4), None)) * 2,
    "attention_cap": 4.0, "query_scale": 0.3, "post_norms": True, "norm_offset": 1.0,
}  # fmt: skip


def loss_of(decoder: Decoder, sight: Sight, tokens):
    def loss(params, tokens, position, end):
        hidden, _ = decoder.apply({"params": params}, tokens, position, end)
        wave = jnp.sin(jnp.arange(hidden.size)).reshape(hidden.shape)
        return jnp.sum(jnp.where(end[:, :, None] > 0, hidden * wave, 0))

    return jax.jit(jax.value_and_grad(loss)), (tokens, sight.position, sight.end)


def assert_alike(found, expected):
    """The loss agrees, and each gradient up to rounding, which its norm measures.

    Single elements say less: these sums cancel, and the einsum, computed on a mesh, differs from
    itself by a thousandth of its small ones. As a share of the norm that difference is 1e-5.
    """
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-5, atol=1e-3)

    def near(a, b):
        assert np.linalg.norm(np.subtract(a, b)) <= 3e-5 * np.linalg.norm(b)

    jax.tree.map(near, found[1], expected[1])


@pytest.mark.slow_except("gemma-2-none", "llama-full")
@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("facts", [{}, GEMMA], ids=["llama", "gemma-2"])
def test_the_decoder_says_the_same_in_blocks(facts, remat, tiny, random_params):
    config = tiny(**facts)
    params, sight = random_params(config), random_trees(np.random.default_rng(0), 3, TIME)
    tokens = np.random.default_rng(1).integers(0, 96, (3, TIME)).astype(np.int32)
    blocks, row = loss_of(Decoder(config, remat=remat, back_end="blocks"), sight, tokens)
    plain, _ = loss_of(Decoder(config, back_end="einsum"), sight, tokens)
    assert_alike(blocks(params, *row), plain(params, *row))


def test_a_context_that_is_kept_is_not_computed_again(tiny, random_params):
    config, sight = tiny(), random_trees(np.random.default_rng(0), 3, TIME)

    def loops(remat):
        f, row = loss_of(
            Decoder(config, remat=remat, back_end="blocks", scan=False), sight,
            np.zeros((3, TIME), np.int32),
        )  # fmt: skip
        return str(jax.make_jaxpr(f)(unstack(random_params(config)), *row)).count("while[")

    # Two layers; forward and backward, and the forward pass once more where nothing is kept.
    assert (loops("dots"), loops("full")) == (4, 6)


@pytest.mark.slow_except("sizes1", "sizes2")
@pytest.mark.parametrize("sizes", [(1, 4, 2), (2, 2, 2), (1, 8, 1)])
def test_on_a_mesh_each_device_visits_its_own_rows_and_heads(sizes, tiny, random_params):
    config, rng = tiny(**GEMMA), np.random.default_rng(0)
    sight = random_trees(rng, ROWS, TIME)
    tokens = rng.integers(0, 96, (ROWS, TIME)).astype(np.int32)
    mesh = make_mesh(sizes, jax.devices()[:8])
    where = shardings(abstract_params(config), mesh, TRAINING)
    placed = jax.tree.map(jax.device_put, random_params(config), where)
    blocks, row = loss_of(
        Decoder(config, remat="full", back_end="blocks", mesh=mesh), sight, tokens
    )
    plain, _ = loss_of(Decoder(config, back_end="einsum"), sight, tokens)
    found = blocks(placed, *place_rows(row, mesh))
    assert_alike(jax.device_get(found), plain(random_params(config), *row))
