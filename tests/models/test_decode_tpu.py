"""The TPU's kernel for decoding: interpreted on CPU against the einsum, and compiled for TPUs."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from selm_jax.models import decode_tpu
from selm_jax.models.attention import attention, einsum, with_sinks
from selm_jax.models.attention_blocks import FLOOR
from selm_jax.models.cache import LayerCache, write
from selm_jax.models.decode_tpu import block_of, decode_kernel, ragged
from selm_jax.models.sight import Sight
from selm_jax.parallel.mesh import make_mesh
from selm_jax.plan.topology import target


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 128 tokens, the least: so a short cache has several."""
    monkeypatch.setattr(decode_tpu, "_LONGEST", 128)


def step(lengths, heads, k, h, capacity, window=None):
    """A decoding step whose slots see that many entries: query, keys, values and the mask."""
    rng = np.random.default_rng(0)
    place = jnp.asarray(lengths, jnp.int32)[:, None] - 1
    query = rng.normal(size=(len(lengths), 1, heads, h))
    cache = rng.normal(size=(2, len(lengths), capacity, k, h))
    sight = Sight(place, jnp.arange(capacity)[None], place=place)
    if window is not None:
        sight = sight._replace(window=jnp.int32(window))
    return *(jnp.asarray(x, jnp.float32) for x in (query, *cache)), sight


# heads, key heads, head_dim, capacity, cap, window
CASES = [
    (4, 4, 64, 512, None, None),
    (8, 2, 128, 512, 5.0, None),
    (9, 3, 64, 400, None, None),  # not whole blocks
    (4, 1, 96, 384, None, 100),
    (4, 2, 256, 300, 20.0, 130),
    (4, 2, 32, 48, None, None),  # less than a block
    (2, 1, 64, 384, None, np.iinfo(np.int32).max),  # as a layer without a window, among others
]


@pytest.mark.parametrize(("heads", "k", "h", "capacity", "cap", "window"), CASES)
def test_it_gives_the_oracles_values(heads, k, h, capacity, cap, window, small_blocks):
    inside = [n for n in (2, 31, 127, 128, 129, 256, 257) if n < capacity]
    lengths = [1, *inside, capacity - 1, capacity]
    given = step(lengths, heads, k, h, capacity, window)
    found, _ = decode_kernel(*given, h**-0.5, cap, interpret=True)
    np.testing.assert_allclose(found, einsum(*given, h**-0.5, cap), rtol=1e-5, atol=1e-5)


def test_what_no_query_sees_is_not_read(small_blocks):
    """Blocks are skipped or read in part. Keys that are not seen are NaN; so are values ahead."""
    query, keys, values, sight = step([1, 128, 200, 512], 4, 2, 64, 512, window=90)
    expected = einsum(query, keys, values, sight, 0.125)
    dead = ~sight.mask()[:, 0, :, None, None]
    ahead = (sight.key_position > sight.place)[:, :, None, None]
    keys, values = jnp.where(dead, jnp.nan, keys), jnp.where(ahead, jnp.nan, values)
    found, _ = decode_kernel(query, keys, values, sight, 0.125, interpret=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("lengths", "first"), [([0, 5, 0], [0, 5, 0]), ([128, 0, 64], [128, 0, 64])]
)
def test_a_slot_that_sees_nothing_gets_zeros(lengths, first, small_blocks):
    query, keys, values, _ = step([1] * 3, 4, 2, 64, 256)
    of_heads = query.reshape(3, 2, 2, 64)
    keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
    bounds = jnp.asarray(first, jnp.int32), jnp.asarray(lengths, jnp.int32)
    found, logsumexp = ragged(of_heads, keys, values, *bounds, 0.125, interpret=True)
    np.testing.assert_array_equal(found, 0)
    np.testing.assert_array_equal(logsumexp, np.float32(FLOOR))


def test_it_gives_the_same_with_a_tpus_memory_simulated(small_blocks):
    """Buffers begin as NaN and are reused as on a TPU, which plain interpretation does not show."""
    given = step([1, 130, 300], 4, 2, 64, 300)
    simulated = pltpu.InterpretParams(uninitialized_memory="nan")
    found, _ = decode_kernel(*given, 0.125, interpret=simulated)
    np.testing.assert_allclose(found, einsum(*given, 0.125), rtol=1e-5, atol=1e-5)


def test_on_a_mesh_each_device_has_its_slots_and_heads(small_blocks):
    given = step([3, 129, 256, 77], 8, 2, 64, 256, window=100)
    mesh = make_mesh((2, 2, 2), jax.devices()[:8])

    @jax.jit
    def found(*given):
        return attention(*given, scale=0.125, cap=9.0, back_end="kernel", mesh=mesh)

    np.testing.assert_allclose(found(*given), einsum(*given, 0.125, 9.0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("k", "capacity", "h", "item", "block"),
    [(8, 8192, 128, 2, 256), (2, 8192, 128, 2, 512), (32, 4096, 96, 2, 128), (8, 144, 64, 2, 144)],
)
def test_a_block_has_half_a_mebibyte_of_keys_if_it_can(k, capacity, h, item, block):
    assert block_of(k, capacity, h, item) == block


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.parametrize("capacity", [8192, 4160])
@pytest.mark.parametrize(
    "heads, k, h, cap",
    [(9, 3, 64, None), (32, 32, 96, None), (32, 8, 128, None), (8, 4, 256, 50.0)],
)
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_steps_compile_for_tpus_and_do_not_copy_the_cache(name, heads, k, h, cap, capacity):
    where = SingleDeviceSharding(target(name).devices[0])
    array = partial(jax.ShapeDtypeStruct, sharding=where)
    query = array((16, 1, heads, h), jnp.bfloat16)
    cache = array((16, k, capacity, h), jnp.bfloat16)
    new = array((16, 1, k, h), jnp.bfloat16)

    def steps(cache, query, new, place):
        def one(state):
            cache, place, context = state
            cache = write(cache, new * context[:, :, :1], new, place)
            sight = Sight(place[:, None], jnp.arange(capacity)[None], place=place[:, None])
            keys, values = cache.keys.swapaxes(1, 2), cache.values.swapaxes(1, 2)
            context, _ = decode_kernel(query, keys, values, sight, h**-0.5, cap)
            return cache, place + 1, context

        return jax.lax.while_loop(lambda s: s[1][0] < 99, one, (cache, place, query))

    given = LayerCache(cache, cache), query, new, array((16,), jnp.int32)
    compiled = jax.jit(steps, donate_argnums=0).lower(*given).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
    # Where head_dim does not fill its lanes, XLA lays the cache out anew before the loop, padded,
    # for any back end. In the loop nothing is copied.
    padded = 0 if h % 128 == 0 else 2 * 16 * k * capacity * 128 * -(-h // 128) * 2
    lanes = 16 * k * max(8, heads // k) * 128 * 4  # of the logsumexp
    assert compiled.memory_analysis().temp_size_in_bytes < padded + lanes + 2**21


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.parametrize("name", ["v5e:2x2", "v6e:2x2"])
def test_a_step_of_gpt_oss_with_sinks_compiles_for_tpus_as_one_kernel(name):
    """The 20b model has 64 heads of 64 dimensions, and 8 key-value heads."""
    array = partial(jax.ShapeDtypeStruct, sharding=SingleDeviceSharding(target(name).devices[0]))
    cache, sinks = array((16, 8, 4096, 64), jnp.bfloat16), array((64,), jnp.bfloat16)

    def step(query, keys, values, sinks, place):
        sight = Sight(place, jnp.arange(4096)[None], place=place, window=jnp.int32(128))
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)
        return with_sinks(*decode_kernel(query, keys, values, sight, 0.125), sinks)

    query, place = array((16, 1, 64, 64), jnp.bfloat16), array((16, 1), jnp.int32)
    compiled = jax.jit(step).lower(query, cache, cache, sinks, place).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 1
