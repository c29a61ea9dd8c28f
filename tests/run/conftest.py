"""The loop is tested on one device; what the mesh changes is tested in tests/training."""

import contextlib
import threading

import jax
import pytest
import stand_in

from selm_jax.parallel.mesh import make_mesh


@pytest.fixture(autouse=True, scope="module")
def one_device():
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "selm_jax.run.run.make_mesh",
            lambda sizes, devices=None, **_: make_mesh(sizes, devices or first),
        )
        patch.delenv("XLA_FLAGS", raising=False)  # for the processes that tests start
        yield


@pytest.fixture
def serving():
    """serving(engine, folder, ...) -> a server at work."""
    with contextlib.ExitStack() as stack:

        def start(*arguments, **settings):
            server = stand_in.StandIn(*arguments, **settings)
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            return server

        yield start
