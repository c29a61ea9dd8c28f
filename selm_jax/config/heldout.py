"""Settings of the named held-out sets, which are evaluated besides `data.heldout`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict
from pydantic.dataclasses import dataclass

from selm_jax.config.kinds import All, refuse

_NAME = re.compile(r"[a-z][a-z0-9_]*")
_TAKEN = ("pairs",)  # `heldout/pairs/accuracy` is a measure of `data.heldout`


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class HeldoutSet:
    """One held-out set: its data, in the same forms and columns as `data.heldout`."""

    source: str
    split: str | None = None
    config: str | None = None
    limit: All | None = None


def _named(sets: Any) -> Any:
    """Writes `NAME: SOURCE`, the short form, as a group."""
    if not isinstance(sets, Mapping):
        return sets
    return {n: {"source": each} if isinstance(each, str) else each for n, each in sets.items()}


def _with_good_names(sets: dict[str, HeldoutSet]) -> dict[str, HeldoutSet]:
    refuse(list(_bad_names(sets)))
    return sets


def _bad_names(sets: Mapping[str, HeldoutSet]) -> Iterator[str]:
    for name in sets:
        if not _NAME.fullmatch(name):
            yield (
                f"{name}: a name becomes part of metrics' and files' names. Use small letters, "
                "digits and _, beginning with a letter"
            )
        elif name in _TAKEN:
            yield f"{name}: metrics of data.heldout have this name. Choose another one"


HeldoutSets = Annotated[
    dict[str, HeldoutSet], BeforeValidator(_named), AfterValidator(_with_good_names)
]

# Measures by which `keep_best` may choose a model, and whether a higher value is better.
OF_ANSWERS = dict.fromkeys(
    ("reward_greedy", "reward_sample", "gain", "capability", "pairs/accuracy", "pairs/margins"),
    True,
)
OF_PAIRS = {"accuracy": True, "margin": True, "loss": False}  # a reward model's


def bad_metric(metric: str, sets: Collection[str]) -> str | None:
    """The reason why `keep_best` cannot name a metric; None if it can."""
    found = re.fullmatch(r"heldout/(?:(\w+)/)??(pairs/\w+|\w+)", metric)
    measures = OF_ANSWERS | OF_PAIRS
    if found is None or found[2] not in measures:
        return (
            f"{metric!r}; `heldout/MEASURE` or `heldout/SET/MEASURE` was expected, with one of "
            f"{', '.join(measures)}"
        )
    if found[1] not in (None, *sets):
        return f"{metric!r}: data.heldout_sets names no set {found[1]!r}"
    return None
