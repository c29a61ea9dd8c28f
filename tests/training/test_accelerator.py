"""The gradients of an update on an accelerator against those on the CPU: `pytest -m gpu`."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from selm_jax.models.decoder import Decoder
from selm_jax.objectives.losses import selm
from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import common_shape, pack
from selm_jax.training.loop import mean_lengths
from selm_jax.training.optimizer import optimizer
from selm_jax.training.update import make_update

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("length", [64, 1024])  # short rows take the einsum, long ones blocks
def test_the_gradients_are_the_cpus(length, tiny, random_params):
    rng = np.random.default_rng(0)
    config = tiny(vocab_size=512)

    def ids(count):
        return tuple(map(int, rng.integers(0, 512, count)))

    roles = {"chosen": 0, "rejected": 1, "explore": 2}
    examples = [
        Example(
            str(i), ids(length // 16), tuple(ids(length // 8) for _ in range(3)), roles, (-1.0,) * 3
        )
        for i in range(4)
    ]
    (batch,) = pack(examples, common_shape([examples], rows=2, time=length))
    adamw = optimizer("adamw", b1=0.9, b2=0.99, eps=1e-8, weight_decay=0.0)
    params = random_params(config)

    def found(device):
        update = make_update(Decoder(config), selm(0.1, 0.01), adamw, chunk=32)
        with jax.default_device(device), jax.default_matmul_precision("highest"):
            there = jax.device_put((params, batch), device)
            gradients, sums = update.gradients(*there, mean_lengths(examples))
            return jax.device_get(gradients), float(sums["loss"])

    (want, loss), (got, again) = found(jax.devices("cpu")[0]), found(jax.devices()[0])
    assert again == pytest.approx(loss, rel=1e-5)
    squared = lambda tree: sum(float(np.sum(np.square(x))) for x in jax.tree.leaves(tree))
    difference = jax.tree.map(lambda x, y: np.asarray(x) - np.asarray(y), got, want)
    assert squared(difference) < 1e-8 * squared(want)
