"""The figures of the paper know which run is DPO."""

from types import SimpleNamespace

import pytest

from selm_jax.commands.figures import _is_dpo


@pytest.mark.parametrize(
    ("objective", "expected"),
    [
        ({"loss": "dpo", "beta": 0.1}, True),
        ({"loss": "selm", "alpha": 0}, True),
        ({"loss": "selm", "alpha": [0]}, True),
        ({"loss": "selm", "alpha": [0, 0.0, 0]}, True),
        ({"loss": "selm", "alpha": [0, 0.01, 0]}, False),
        ({"loss": "selm", "alpha": 0.01}, False),
        ({"loss": "simpo", "beta": 2.0}, False),
    ],
)
def test_selm_without_optimism_in_all_iterations_is_dpo(objective, expected):
    run = SimpleNamespace(experiment=SimpleNamespace(objective=objective))
    assert _is_dpo(run) is expected
