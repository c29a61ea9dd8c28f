"""Fixtures: the loop is tested on one device; tests/training tests the effects of the mesh."""

import contextlib
import threading

import pytest
import stand_in
import tiny


@pytest.fixture(autouse=True, scope="module")
def one_device():
    with pytest.MonkeyPatch.context() as patch:
        tiny.on_first_device(patch)
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
