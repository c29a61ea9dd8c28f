"""The loop is tested on one device; what the mesh changes is tested in tests/training."""

import jax
import pytest

from selm_jax.parallel.mesh import make_mesh


@pytest.fixture(autouse=True, scope="module")
def one_device():
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "selm_jax.run.make_mesh",
            lambda sizes, devices=None, **_: make_mesh(sizes, devices or first),
        )
        patch.delenv("XLA_FLAGS", raising=False)  # for the processes that tests start
        yield
