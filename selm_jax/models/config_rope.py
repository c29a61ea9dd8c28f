"""Reads and writes the rotary position embeddings of a `config.json`, for all model families."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from selm_jax.models.config import (
    Linear,
    Llama3,
    LongRope,
    Proportional,
    Rope,
    UnsupportedModel,
    Yarn,
)
from selm_jax.models.config_keys import Json, Keys, number, size

_ORIGINAL, _POSITIONS = "original_max_position_embeddings", "max_position_embeddings"


def rotary_fraction(k: Keys, default: float = 1.0) -> float:
    """Reads which share of each head's dimensions is rotated, for families where it may be part."""
    outer = k.number("partial_rotary_factor", None)
    rope = k.object("rope_parameters") or k.object("rope_scaling")
    inner = rope.get("partial_rotary_factor")
    found = outer if inner is None or outer is not None else number("partial_rotary_factor", inner)
    if found is not None and found > 1:
        raise UnsupportedModel(
            f"config.json: partial_rotary_factor is {found:g}; expected a number up to 1"
        )
    return default if found is None else found


def rope_from(k: Keys, theta: float, fraction: float = 1.0, original: int | None = None) -> Rope:
    """Reads the `Rope` of a model; `theta` is the default base.

    `fraction` is the only value that the key partial_rotary_factor may have. `original` is for
    families for which transformers takes the original context from the top level alone: its
    default there.

    transformers 5 stores everything under `rope_parameters`; earlier versions store the base at the
    top level and the rest under `rope_scaling`.
    """
    new, old = k.object("rope_parameters"), k.object("rope_scaling")
    if new and old and new != old:
        raise UnsupportedModel(
            f"config.json: rope_parameters {new!r:.200} and rope_scaling {old!r:.200} contradict "
            "each other. Remove the wrong one"
        )
    return rope_of(new or old, k.number("rope_theta", None) or theta, k, fraction, original)


def rope_of(
    parameters: Mapping[str, Any],
    theta: float,
    k: Keys,
    fraction: float = 1.0,
    original: int | None = None,
) -> Rope:
    """Reads the `Rope` from an object of rope parameters; arguments as for `rope_from`."""
    if not isinstance(parameters, Mapping):
        raise UnsupportedModel(
            f"config.json: rope parameters are {parameters!r:.60}; expected an object"
        )
    p = dict(parameters)
    kinds = {str(p.pop(key)) for key in ("rope_type", "type") if key in p}
    inner = number("rope_theta", p.pop("rope_theta", theta))
    # The two bases can contradict each other only if both are given: a default does not count.
    if k("rope_theta", None) is not None and "rope_theta" in parameters and inner != theta:
        raise UnsupportedModel(
            f"config.json: rope_theta is {theta}, but rope_parameters says {inner}. Correct the "
            "wrong one"
        )
    share = p.pop("partial_rotary_factor", None)
    if share not in (fraction, None) and kinds != {"proportional"}:
        raise UnsupportedModel(
            f"config.json: rope parameters have partial_rotary_factor {share!r:.60}; the decoder "
            f"supports only {fraction:g} here. Use another model"
        )
    said = k.size(_ORIGINAL, None)
    outer = said or original
    if outer is not None and p.get(_ORIGINAL, outer) != outer:
        by_default, mend = (
            ("", "Correct the wrong one")
            if said
            else (" by default", "Write it at the top level, too")
        )
        raise UnsupportedModel(
            f"config.json: {_ORIGINAL} is {outer}{by_default}, but rope scaling says "
            f"{p[_ORIGINAL]!r:.60}. {mend}"
        )
    original = p.pop(_ORIGINAL, outer)
    try:
        match sorted(kinds) or ["default"]:
            case ["default"]:
                scaling = None
            case ["linear"]:
                scaling = Linear(_factor(p, "factor"))
            case ["llama3"]:
                scaling = Llama3(
                    _factor(p, "factor"),
                    _factor(p, "low_freq_factor"),
                    _factor(p, "high_freq_factor"),
                    size(_ORIGINAL, original),
                )
            case ["longrope"] | ["su"]:
                scaling = _longrope(p, size(_ORIGINAL, original or k.size(_POSITIONS)), k)
            case ["yarn"]:
                scaling = _yarn(p, size(_ORIGINAL, original or k.size(_POSITIONS)), k)
            case ["proportional"] if fraction == 1:
                scaling = Proportional(
                    1.0 if share is None else number("partial_rotary_factor", share),
                    number("factor", p.pop("factor", 1.0)),
                )
            case found:
                raise UnsupportedModel(
                    f"config.json: rope type is {', '.join(found)}; the decoder supports default, "
                    "linear, llama3, longrope, yarn and proportional"
                    f"{_DYNAMIC * (found == ['dynamic'])}"
                )
    except KeyError as missing:
        raise UnsupportedModel(
            f"config.json: rope scaling {parameters!r:.200} has no {missing}. Add it, as in the "
            "config.json at the model's source"
        ) from None
    if p:
        raise UnsupportedModel(
            f"config.json: rope type {''.join(kinds) or 'default'!r} does not have the parameters "
            f"{', '.join(sorted(p))}: {parameters!r:.200}. Remove them, or correct the type"
        )
    return Rope(inner, scaling)


def _longrope(p: Json, original: int, k: Keys) -> LongRope:
    said = p.pop("factor", None)
    factor = k.size(_POSITIONS) / original if said is None else number("factor", said)
    magnitude = p.pop("attention_factor", None)
    return LongRope(
        _table(p, "short_factor"),
        _table(p, "long_factor"),
        original,
        magnitude_of(factor, original)
        if magnitude is None
        else number("attention_factor", magnitude),
    )


_DYNAMIC = (
    ". With dynamic, a token's log-probability would depend on the longest sequence of its batch. "
    "Set the rope type to yarn with the same factor, or to default for short sequences"
)


def _yarn(p: Json, original: int, k: Keys) -> Yarn:
    factor = p.pop("factor")
    factor = k.size(_POSITIONS) / original if factor is None else number("factor", factor)
    truncate = p.pop("truncate", True)
    if not isinstance(truncate, bool):
        raise UnsupportedModel(f"config.json: truncate is {truncate!r:.60}; expected true or false")

    def said(key: str) -> float | None:
        value = p.pop(key, None)
        return number(key, value) if value else None  # null and 0 mean the default

    some, every = said("mscale"), said("mscale_all_dim")
    magnitude = (
        _yarn_magnitude(factor, some) / _yarn_magnitude(factor, every)
        if some and every
        else _yarn_magnitude(factor)
    )
    given = p.pop("attention_factor", None)
    return Yarn(
        factor,
        original,
        said("beta_fast") or 32.0,
        said("beta_slow") or 1.0,
        magnitude if given is None else number("attention_factor", given),
        truncate,
    )


def _yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's `magnitude` for a context extended by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _factor(p: Json, key: str) -> float:
    return number(key, p.pop(key))


def _table(p: Json, key: str) -> tuple[float, ...]:
    values = p.pop(key)
    if not isinstance(values, list):
        raise UnsupportedModel(f"config.json: {key} is {values!r:.60}; expected a list of numbers")
    return tuple(number(key, value) for value in values)


def magnitude_of(factor: float, original: int) -> float:
    """LongRoPE's `magnitude` for a context extended by `factor` (arXiv 2402.13753; as in Phi-3)."""
    return (
        1.0
        if factor <= 1 or original == 1
        else math.sqrt(1 + math.log(factor) / math.log(original))
    )


def rope_to(rope: Rope | None) -> Json:
    assert rope is not None  # only SmolLM3 has layers without rope, and it passes one with rope
    match rope.scaling:
        case None:
            scaling = None
        case Linear(factor):
            scaling = {"rope_type": "linear", "factor": factor}
        case Llama3(factor, low, high, original):
            scaling = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
        case LongRope(short, long, original, magnitude):
            scaling = {
                "rope_type": "longrope",
                "short_factor": list(short),
                "long_factor": list(long),
                "original_max_position_embeddings": original,
                "attention_factor": magnitude,
            }
        case Yarn(factor, original, fast, slow, magnitude, truncate):
            scaling = {
                "rope_type": "yarn",
                "factor": factor,
                "original_max_position_embeddings": original,
                "beta_fast": fast,
                "beta_slow": slow,
                "attention_factor": magnitude,
            } | ({} if truncate else {"truncate": False})
        case Proportional(share, factor):
            scaling = {"rope_type": "proportional", "partial_rotary_factor": share}
            scaling |= {} if factor == 1 else {"factor": factor}
    return {"rope_theta": rope.theta, "rope_scaling": scaling}


def parameters_to(rope: Rope | None) -> Json:
    """The same as one object, as in the `rope_parameters` of transformers 5."""
    hf = rope_to(rope)
    return {"rope_type": "default", **(hf["rope_scaling"] or {}), "rope_theta": hf["rope_theta"]}
