"""What an experiment asks of a model is checked with the model's own configuration."""

import dataclasses

import pytest
import tiny

from selm_jax import config
from selm_jax.models.config import DecoderConfig, Mixture
from selm_jax.run.check import check_router
from selm_jax.run.rows import RunError

DENSE = DecoderConfig(96, 32, 4, 2, 8, 64, (), 1e-5, False, 64, "L")


def test_routers_are_trained_only_where_there_are_some(tmp_path):
    file = tiny.experiment(tmp_path)
    frozen, trained = config.load(file), config.load(file, ["training.router=trained"])
    with pytest.raises(RunError, match="no mixture of experts and has no routers"):
        check_router(trained, DENSE)
    check_router(frozen, DENSE)
    check_router(trained, dataclasses.replace(DENSE, mixture=Mixture(4, 2, True)))
