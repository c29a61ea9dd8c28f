"""Builds the objective that an experiment names: a loss, a sum of losses, or your own function."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, cast

from selm_jax.objectives.losses import (
    LossFunction,
    Objective,
    ObjectiveError,
    apo_down,
    apo_zero,
    bco_pair,
    bradley_terry,
    cdpo,
    compose,
    copo,
    discopop,
    dpo,
    exo_pair,
    geb,
    hinge,
    inpo,
    ipo,
    ipo_online,
    ld_dpo,
    nash,
    nca_pair,
    robust,
    scaled,
    se_popo,
    selm,
    sft,
    sigmoid_norm,
    simpo,
    sppo,
    sppo_hard,
    vpo,
    weighted_optimism,
    wpo,
    xpo,
)
from selm_jax.objectives.roles import PAIR, ROLES
from selm_jax.shell.user_code import FORM, UserCodeError, function_at, is_user_code
from selm_jax.shell.words import did_you_mean

TABLE: dict[str, Callable[..., Objective]] = {
    f.__name__: f
    for f in (
        *(dpo, cdpo, robust, ipo, hinge, sigmoid_norm, exo_pair, discopop),
        *(nca_pair, bco_pair, apo_zero, apo_down, simpo, sft, wpo, ld_dpo),
        *(selm, xpo, vpo, se_popo, copo, geb),
        *(sppo_hard, sppo, ipo_online, inpo, nash),
        bradley_terry,
    )
} | {"optimism": weighted_optimism}

_SORTS = (
    "it compares sorted log-ratios, so an example's loss depends on all others of its update, but "
    "an update here is a sum over examples that is accumulated from microbatches. Of losses per "
    "example, dpo is the nearest"
)
_SAMPLES_AGAIN = (
    "each of its updates starts with a trial step, samples new answers from the policy after that "
    "step, has them ranked, and steps again from where the trial began; an iteration here has all "
    "its answers and scores before its first update. Without the trial step it is online mirror "
    "descent: name `nash`, with feedback.explore: sample"
)
REFUSED = {
    "aot": _SORTS,
    "aot_unpaired": _SORTS,
    "egpo": _SAMPLES_AGAIN,
}


def build_objective(name: str, **settings: object) -> Objective:
    """Builds an objective from a name in `TABLE`, your own function, or a sum of these.

    In a sum, each term receives the settings for which it has a parameter, so all terms share one
    beta: `build_objective("ipo+optimism", beta=0.1, alpha=0.001)` is ipo(0.1) plus
    0.001 * 0.1 * r(explore); with convention="alpha" it is ipo(0.1) plus 0.001 * r(explore).
    Optimism can be added to any loss in this way; "selm" is "dpo+optimism". A term may have a
    weight, as in "dpo+0.2*sft".

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
    weighted = [_weighted(part) for part in name.split("+")]
    weights, terms = dict(weighted), [term for term, _ in weighted]
    if twice := [term for term in terms if terms.count(term) > 1]:
        raise ObjectiveError(f"objective {name} names {twice[0]} twice; name each term once")
    factories = {term: _factory(term) for term in terms}
    parameters = {term: _parameters(f) for term, f in factories.items()}
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
        part = made if isinstance(made, Objective) else Objective(ROLES, cast(LossFunction, made))
        _check_divergence(term, part, parameters[term], settings)
        parts.append(part if weights[term] == 1 else scaled(weights[term], part))
    objective = parts[0] if len(parts) == 1 else compose(*parts)
    match settings.get("beta"):
        case int() | float() as beta:
            return dataclasses.replace(objective, beta=float(beta))
    return objective


def _weighted(part: str) -> tuple[str, float]:
    """Splits `0.2*sft` into the term and its weight, which is 1 if none is written."""
    weight, star, term = part.rpartition("*")
    try:
        return term.strip(), float(weight) if star else 1.0
    except ValueError:
        raise ObjectiveError(
            f"objective {part.strip()!r}: {weight.strip()!r} is no weight; expected a number, as "
            "in 'dpo+0.2*sft'"
        ) from None


def _check_divergence(term: str, part: Objective, parameters: Any, settings: Any) -> None:
    """Refuses another divergence for a loss of pairs that is not one of their margin alone."""
    asked = settings.get("f_divergence", "reverse_kl")
    if asked != "reverse_kl" and "f_divergence" not in parameters and set(PAIR) <= set(part.roles):
        able = ", ".join(n for n, f in TABLE.items() if "f_divergence" in _parameters(f))
        raise ObjectiveError(
            f"objective {term} has no form for f_divergence {asked!r}: a response's reward is then "
            "known up to a number of the prompt, which cancels in the margin alone. Remove "
            f"f_divergence, or name one of: {able}; 'dpo+optimism' for 'selm'"
        )


def _parameters(factory: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(factory).parameters


def _factory(term: str) -> Callable[..., Any]:
    if term in TABLE:
        return TABLE[term]
    if term in REFUSED:
        raise ObjectiveError(f"objective {term} is not here: {REFUSED[term]}")
    if not is_user_code(term):
        raise ObjectiveError(
            f"unknown objective {term!r}{did_you_mean(term, TABLE)} Known: {', '.join(TABLE)}; "
            f"sums such as 'ipo+optimism'; your own function as {FORM!r}"
        )
    try:
        return function_at(term)
    except UserCodeError as error:
        raise ObjectiveError(f"objective {term!r}: {error}") from error
