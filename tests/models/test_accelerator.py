"""Attention on an accelerator against the CPU: `pytest -m gpu` with JAX_PLATFORMS=cuda,cpu.

On CPU alone both sides are the CPU; then only the test itself is tried.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.models.attention import attention
from selm_jax.models.sight import Sight

pytestmark = pytest.mark.gpu

TIME, PROMPT, RESPONSE = 1024, 128, 192


@pytest.fixture(scope="module")
def row() -> tuple[np.ndarray, ...]:
    """A row of one prompt and four responses; the rest is padding. Positions, and ends."""
    position, end = np.zeros((2, 1, TIME), np.int32)
    used = PROMPT + 4 * RESPONSE
    position[0, :PROMPT], end[0, :PROMPT] = np.arange(PROMPT), used
    for begin in range(PROMPT, used, RESPONSE):
        position[0, begin : begin + RESPONSE] = PROMPT + np.arange(RESPONSE)
        end[0, begin : begin + RESPONSE] = begin + RESPONSE
    return position, end


@pytest.mark.parametrize(("dtype", "tolerance"), [(jnp.float32, 2e-5), (jnp.bfloat16, 3e-2)])
def test_blocks_give_the_cpus_values_and_gradients(dtype, tolerance, row):
    position, end = row
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(1, TIME, heads, 64)).astype(np.float32) for heads in (8, 2, 2, 8)]
    seen = (end > 0)[..., None, None]  # what padding gives has no meaning

    def both(device, back_end, dtype):
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            query, keys, values, gradient = (jnp.asarray(x, dtype) for x in arrays)
            sight = Sight(*map(jnp.asarray, (position, position, end)))
            f = lambda *x: attention(*x, sight, scale=0.125, back_end=back_end)
            out, backward = jax.vjp(f, query, keys, values)
            found = (out * seen, *backward(gradient * seen.astype(dtype)))
            return [np.asarray(x, np.float32) for x in found]

    expected = both(jax.devices("cpu")[0], "einsum", jnp.float32)
    for got, want in zip(both(jax.devices()[0], "blocks", dtype), expected, strict=True):
        assert np.linalg.norm(got - want) < tolerance * np.linalg.norm(want)
