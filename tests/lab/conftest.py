"""Small worlds, in double precision for identities that are tested to many digits."""

import jax
import pytest

from selm_jax.lab.worlds import WorldShape, make_world

MADE = jax.jit(make_world, static_argnums=(1, 2))


@pytest.fixture
def double():
    with jax.enable_x64(True):
        yield


@pytest.fixture
def world(double):
    """world(...) is a random double-precision world of a few prompts and responses."""

    def make(seed=0, dimension=3, landscape="two_peaks", coverage=0.05, prompts=3, responses=8):
        shape = WorldShape(prompts, responses, dimension, beta=0.3)
        return MADE(jax.random.key(seed), shape, landscape, coverage)

    return make
