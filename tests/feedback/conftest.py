"""Runs that rankers take part in, on one device; what the mesh changes is tested elsewhere."""

import pytest
import tiny


@pytest.fixture(autouse=True, scope="module")
def one_device_for_runs():
    with pytest.MonkeyPatch.context() as patch:
        tiny.on_first_device(patch)
        yield
