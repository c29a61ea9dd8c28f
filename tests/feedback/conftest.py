"""Runs with rankers, on one device; effects of the mesh are tested elsewhere."""

import pytest
import tiny


@pytest.fixture(autouse=True, scope="module")
def one_device_for_runs():
    with pytest.MonkeyPatch.context() as patch:
        tiny.on_first_device(patch)
        yield
