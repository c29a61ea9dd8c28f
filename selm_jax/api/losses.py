"""Makes loss functions, from a name or from your own function."""

from __future__ import annotations

from typing import Any

from selm_jax.api.errors import ApiError, refuse_settings
from selm_jax.objectives.build import build_objective
from selm_jax.objectives.losses import LossFunction, Objective
from selm_jax.objectives.roles import ROLES


def loss(name: str | LossFunction, /, **settings: Any) -> Objective:
    """Makes a loss from its name in an experiment file (`objective`), or from your own function.

    Args:
      name: a name such as "dpo" or "selm", a sum such as "ipo+optimism",
        `package.module:function`, or a function `logps -> (losses, metrics)` that returns one loss
        and one value of each metric per pair.
      settings: the loss's settings, such as `beta` and `alpha`.

    Raises:
      ObjectiveError: the name is unknown, a setting is missing, or the loss does not have it.
      ApiError: a function was given settings.

    >>> loss("selm", beta=0.1, alpha=1e-3).roles
    ('chosen', 'rejected', 'explore')
    >>> print(loss(lambda logps: (logps.log_ratio("chosen"), {})))
    objective <lambda>
    """
    if isinstance(name, str):
        return build_objective(name, **settings)
    if not callable(name):
        raise ApiError(
            f"loss is {name!r}, which is not a loss. Give a name, or a function of "
            "log-probabilities"
        )
    refuse_settings(settings)
    return Objective(ROLES, name)
