"""The TPU's kernel: interpreted on CPU against the einsum, and compiled by the TPU's compiler."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import SingleDeviceSharding

from selm_jax.models import attention_tpu
from selm_jax.models.attention import attention, einsum
from selm_jax.models.attention_tpu import block_of, kernel, row_of, steps
from selm_jax.models.sight import Sight
from selm_jax.parallel.mesh import make_mesh
from selm_jax.plan.topology import target


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of 128 tokens, the least: so a short row has several."""
    monkeypatch.setattr(attention_tpu, "_LARGEST", 128)


def tree(rows: int, time: int, prompt: int, padding: int) -> Sight:
    """A prompt and two responses of equal length in each row; the last row is padding alone."""
    position, end = np.zeros((2, rows, time), np.int32)
    last = time - padding
    middle = prompt + (last - prompt) // 2
    position[:-1, :prompt], end[:-1, :prompt] = np.arange(prompt), last
    for first, stop in ((prompt, middle), (middle, last)):
        position[:-1, first:stop] = prompt + np.arange(stop - first)
        end[:-1, first:stop] = stop
    return Sight(jnp.asarray(position), jnp.asarray(position), jnp.asarray(end))


# rows, time, prompt, query heads, key heads, head_dim, cap, window
CASES = [
    (2, 512, 200, 4, 4, 64, None, None),
    (2, 512, 300, 4, 1, 96, 5.0, None),
    (2, 600, 150, 4, 2, 64, None, 170),  # not whole blocks
    (2, 384, 140, 2, 1, 256, 20.0, 200),
]


@pytest.mark.parametrize(("rows", "time", "prompt", "heads", "k", "h", "cap", "window"), CASES)
def test_values_and_gradients_are_the_oracles(
    rows, time, prompt, heads, k, h, cap, window, small_blocks
):
    rng = np.random.default_rng(0)
    sight = tree(rows, time, prompt, padding=20)
    sight = sight._replace(window=None if window is None else jnp.int32(window))
    query, weight = (
        jnp.asarray(rng.normal(size=(rows, time, heads, h)), jnp.float32) for _ in range(2)
    )
    keys, values = (jnp.asarray(rng.normal(size=(rows, time, k, h)), jnp.float32) for _ in range(2))
    sees = sight.mask().any(-1)[:, :, None, None]

    def of(back_end):
        value, backward = jax.vjp(jax.jit(back_end), query, keys, values)
        assert np.isfinite(value).all()
        return jnp.where(sees, value, 0), *backward(weight * sees)

    found = of(lambda q, x, v: kernel(q, x, v, sight, h**-0.5, cap, interpret=True)[0])
    expected = of(lambda q, x, v: einsum(q, x, v, sight, h**-0.5, cap))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_values_and_gradients_are_the_same_with_a_tpus_memory_simulated(small_blocks):
    """Buffers begin as NaN and are reused as on a TPU, which plain interpretation does not show."""
    rng = np.random.default_rng(0)
    sight = tree(2, 300, 140, padding=20)._replace(window=jnp.int32(170))
    query, weight = (jnp.asarray(rng.normal(size=(2, 300, 4, 64)), jnp.float32) for _ in range(2))
    keys, values = (jnp.asarray(rng.normal(size=(2, 300, 2, 64)), jnp.float32) for _ in range(2))
    sees = sight.mask().any(-1)[:, :, None, None]

    def of(back_end):
        value, backward = jax.vjp(back_end, query, keys, values)
        return jnp.where(sees, value, 0), *backward(weight * sees)

    simulated = pltpu.InterpretParams(uninitialized_memory="nan")
    found = of(lambda *x: kernel(*x, sight, 0.125, 20.0, interpret=simulated)[0])
    expected = of(lambda *x: einsum(*x, sight, 0.125, 20.0))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("by_keys", [False, True])
def test_steps_are_the_blocks_that_are_seen_and_every_diagonal(by_keys):
    sight = tree(2, 2560, 1024, padding=256)
    mask = np.asarray(sight.mask()).reshape(2, 20, 128, 20, 128)
    some, whole = mask.any((2, 4)), mask.all((2, 4))
    listed = steps(row_of(sight), 128, by_keys)
    for r in range(2):
        count = int(listed.count[r])
        pairs = list(zip(listed.queries[r].tolist(), listed.keys[r].tolist(), strict=True))
        wanted = {(i, j) for i, j in np.argwhere(some[r] | np.eye(20, dtype=bool))}
        assert set(pairs[:count]) == wanted and count == len(wanted)
        assert pairs[count:] == [pairs[count - 1]] * (len(pairs) - count)
        run = [pair[by_keys] for pair in pairs[:count]]
        assert run == sorted(run)  # all of a block in one run
        of_whole = [bool(x) for x in listed.whole[r][:count]]
        assert of_whole == [bool(whole[r][pair]) for pair in pairs[:count]]
    # Skipped, seen in part, seen whole: all three occur.
    assert int(listed.count[0]) < 210 and 0 < int(listed.whole[0].sum()) < int(listed.count[0])


@pytest.mark.parametrize(
    ("time", "block"), [(3200, 640), (8192, 512), (5120, 640), (128, 128), (3328, 256)]
)
def test_a_block_divides_the_row(time, block):
    assert block_of(time) == block


def test_on_a_mesh_each_device_has_its_rows_and_heads(small_blocks):
    mesh = make_mesh((2, 2, 2), jax.devices()[:8])
    rng = np.random.default_rng(1)
    sight = tree(4, 256, 100, padding=9)
    q, k, v = (jnp.asarray(rng.normal(size=(4, 256, n, 64)), jnp.float32) for n in (4, 2, 2))

    def loss(back_end, mesh):
        def of(q, k, v):
            out = attention(q, k, v, sight, scale=0.1, back_end=back_end, mesh=mesh)
            return jnp.sum(jnp.where(sight.end[:, :, None, None] > 0, out, 0) ** 2)

        return jax.jit(jax.value_and_grad(of, argnums=(0, 1, 2)))(q, k, v)

    found, expected = loss("kernel", mesh), loss("einsum", None)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), found, expected)


@pytest.mark.slow
@pytest.mark.libtpu
@pytest.mark.parametrize("time", [3200, 8192])
@pytest.mark.parametrize(
    "heads, k, h, cap",
    [(9, 3, 64, None), (32, 32, 96, None), (32, 8, 128, None), (8, 4, 256, 50.0)],
)
@pytest.mark.parametrize("name", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_it_compiles_for_tpus_and_keeps_nothing_of_time_x_time(name, heads, k, h, cap, time):
    where = SingleDeviceSharding(target(name).devices[0])

    def array(shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def both(query, keys, values, gradient, position, end, window):
        # Heads in front, as projections leave them: their own transposes are not the kernel's.
        query, keys, values = (x.swapaxes(1, 2) for x in (query, keys, values))
        sight = Sight(position, position, end, window=window)
        out, backward = jax.vjp(lambda *x: kernel(*x, sight, h**-0.5, cap)[0], query, keys, values)
        found = out, *backward(gradient.swapaxes(1, 2))
        return [x.swapaxes(1, 2) for x in found]

    q, kv = array((1, heads, time, h)), array((1, k, time, h))
    ids, window = array((1, time), jnp.int32), array((), jnp.int32)
    compiled = jax.jit(both).lower(q, kv, kv, q, ids, ids, window).compile()
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 3
    temporary = compiled.memory_analysis().temp_size_in_bytes
    # Where head_dim does not fill its lanes, XLA lays padded copies of the arguments out for the
    # kernel.
    copies = 0 if h % 64 == 0 else 7 * heads * time * attention_tpu.LANES * 2
    assert temporary < 0.1 * 2**30 + copies  # scores of the largest case: 8 GiB
