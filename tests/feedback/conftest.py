"""Runs that rankers take part in, on one device; what the mesh changes is tested elsewhere."""

import jax
import pytest

from selm_jax.parallel.mesh import make_mesh


@pytest.fixture(autouse=True, scope="module")
def one_device_for_runs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "selm_jax.run.run.make_mesh",
            lambda sizes, *_, **__: make_mesh(sizes, jax.devices()[:1]),
        )
        yield
