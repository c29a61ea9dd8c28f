"""Builds the objective that an experiment names: a loss, a sum of losses, or your own function."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, cast

from selm_jax.objectives.losses import (
    LossFunction,
    Objective,
    ObjectiveError,
    bradley_terry,
    cdpo,
    compose,
    dpo,
    hinge,
    ipo,
    robust,
    selm,
    sft,
    simpo,
    weighted_optimism,
    xpo,
)
from selm_jax.objectives.roles import ROLES
from selm_jax.shell.user_code import FORM, UserCodeError, function_at, is_user_code
from selm_jax.shell.words import did_you_mean

TABLE: dict[str, Callable[..., Objective]] = {
    f.__name__: f for f in (dpo, cdpo, robust, ipo, hinge, simpo, sft, selm, xpo, bradley_terry)
} | {"optimism": weighted_optimism}


def build_objective(name: str, **settings: object) -> Objective:
    """Builds an objective from a name in `TABLE`, your own function, or a sum of these.

    In a sum, each term receives the settings for which it has a parameter, so all terms share one
    beta: `build_objective("ipo+optimism", beta=0.1, alpha=0.001)` is ipo(0.1) plus
    0.001 * 0.1 * r(explore); with convention="alpha" it is ipo(0.1) plus 0.001 * r(explore).
    Optimism can be added to any loss in this way; "selm" is "dpo+optimism".

    Your own function is written `package.module:function`. It is called with its settings as
    keyword arguments and returns an `Objective`, or a function(logps) -> (losses, metrics), which
    is given all three roles. To train a reward model, return an `Objective` with `rates=True`.

    Raises ObjectiveError for an unknown name, a missing setting, or a setting that no term has.

    >>> build_objective("ipo+optimism", beta=0.1, alpha=0.001).roles
    ('chosen', 'rejected', 'explore')
    >>> build_objective("sft").reference_free
    True
    >>> build_objective("dpo")
    Traceback (most recent call last):
    selm_jax.objectives.objective.ObjectiveError: objective dpo: dpo needs the setting 'beta'
    """
    terms = [term.strip() for term in name.split("+")]
    if twice := [term for term in terms if terms.count(term) > 1]:
        raise ObjectiveError(f"objective {name} names {twice[0]} twice; name each term once")
    factories = {term: _factory(term) for term in terms}
    parameters = {term: inspect.signature(f).parameters for term, f in factories.items()}
    known = list(dict.fromkeys(key for keys in parameters.values() for key in keys))
    if unknown := [key for key in settings if key not in known]:
        raise ObjectiveError(
            f"objective {name} has no setting {unknown[0]!r}{did_you_mean(unknown[0], known)} "
            f"It has: {', '.join(known) or 'none'}"
        )
    parts: list[Objective] = []
    for term, factory in factories.items():
        for key, parameter in parameters[term].items():
            if parameter.default is parameter.empty and key not in settings:
                raise ObjectiveError(f"objective {name}: {term} needs the setting {key!r}")
        made = factory(**{k: v for k, v in settings.items() if k in parameters[term]})
        if not callable(made):
            raise ObjectiveError(f"{term} returned {made!r}; expected an Objective or a function")
        parts.append(
            made if isinstance(made, Objective) else Objective(ROLES, cast(LossFunction, made))
        )
    objective = parts[0] if len(parts) == 1 else compose(*parts)
    match settings.get("beta"):
        case int() | float() as beta:
            return dataclasses.replace(objective, beta=float(beta))
    return objective


def _factory(term: str) -> Callable[..., Any]:
    if term in TABLE:
        return TABLE[term]
    if not is_user_code(term):
        raise ObjectiveError(
            f"unknown objective {term!r}{did_you_mean(term, TABLE)} Known: {', '.join(TABLE)}; "
            f"sums such as 'ipo+optimism'; your own function as {FORM!r}"
        )
    try:
        return function_at(term)
    except UserCodeError as error:
        raise ObjectiveError(f"objective {term!r}: {error}") from error
