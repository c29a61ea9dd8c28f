"""What the pages draw of an update is what an update reports."""

import re
from pathlib import Path

import jax.numpy as jnp

from selm_jax import report
from selm_jax.objectives.build import build_objective
from selm_jax.objectives.losses import Logps
from selm_jax.objectives.roles import ROLES


def test_every_metric_of_an_objective_that_is_drawn_is_reported():
    files = Path(report.__file__).parent.glob("*.py")
    code = "".join(file.read_text(encoding="utf-8") for file in files)
    drawn = set(re.findall(r'"((?:loss|rewards|logps|optimism)/\w+)"', code))
    one = dict.fromkeys(ROLES, jnp.ones(1))
    _, metrics = build_objective("selm", beta=0.1, alpha=0.01)(Logps(one, one, one, one))
    assert len(drawn) > 5 and drawn <= metrics.keys()
