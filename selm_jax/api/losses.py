"""What an update makes smaller: the losses of an experiment file by their names, or a function."""

from __future__ import annotations

from typing import Any

from selm_jax.api.errors import ApiError
from selm_jax.objectives.build import build_objective
from selm_jax.objectives.losses import LossFunction, Objective
from selm_jax.objectives.roles import ROLES


def loss(name: str | LossFunction, /, **settings: Any) -> Objective:
    """The loss that `objective` names in an experiment file, or a function of yours.

    Args:
      name: such as "dpo" or "selm", a sum such as "ipo+optimism", `package.module:function`, or a
        function `logps -> (losses, metrics)`: one loss, and one number of each metric, per pair.
      settings: the loss's own, such as `beta` and `alpha`.

    Raises:
      ObjectiveError: an unknown name, or a setting that is missing or that the loss does not have.
      ApiError: settings for a function, which has none.

    >>> loss("selm", beta=0.1, alpha=1e-3).roles
    ('chosen', 'rejected', 'explore')
    >>> print(loss(lambda logps: (logps.log_ratio("chosen"), {})))
    objective <lambda>
    """
    if isinstance(name, str):
        return build_objective(name, **settings)
    if not callable(name):
        raise ApiError(f"loss is {name!r}. Give a name, or a function of log-probabilities")
    if settings:
        raise ApiError(f"a function takes no settings, found {', '.join(settings)}. Leave them out")
    return Objective(ROLES, name)
