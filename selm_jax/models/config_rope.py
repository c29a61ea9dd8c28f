"""Reads and writes the rotary position embeddings of a `config.json`, for all model families."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from selm_jax.models.config import Linear, Llama3, LongRope, Rope, UnsupportedModel
from selm_jax.models.config_keys import Json, Keys, number, size

_ORIGINAL, _POSITIONS = "original_max_position_embeddings", "max_position_embeddings"


def rope_from(k: Keys, theta: float) -> Rope:
    """Reads the `Rope` of a model; `theta` is the default base.

    transformers 5 stores everything under `rope_parameters`; earlier versions store the base at the
    top level and the rest under `rope_scaling`.
    """
    new, old = k.object("rope_parameters"), k.object("rope_scaling")
    if new and old and new != old:
        raise UnsupportedModel(
            f"config.json: rope_parameters {new!r:.200} and rope_scaling {old!r:.200} contradict "
            "each other. Remove the wrong one"
        )
    return rope_of(new or old, k.number("rope_theta", None) or theta, k)


def rope_of(parameters: Mapping[str, Any], theta: float, k: Keys) -> Rope:
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
    if p.pop("partial_rotary_factor", 1.0) not in (1.0, None):
        raise UnsupportedModel(
            "config.json: the decoder supports only partial_rotary_factor 1. Use another model"
        )
    original = k.size(_ORIGINAL, None)
    try:
        match sorted(kinds) or ["default"]:
            case ["default"]:
                scaling = None
                p.pop(_ORIGINAL, None)
            case ["linear"]:
                scaling = Linear(_factor(p, "factor"))
            case ["llama3"]:
                scaling = Llama3(
                    _factor(p, "factor"),
                    _factor(p, "low_freq_factor"),
                    _factor(p, "high_freq_factor"),
                    size(_ORIGINAL, p.pop(_ORIGINAL)),
                )
            case ["longrope"] | ["su"]:
                inside = p.pop(_ORIGINAL, original)
                if original not in (None, inside):
                    raise UnsupportedModel(
                        f"config.json: {_ORIGINAL} is {original}, but rope scaling says {inside}. "
                        "Correct the wrong one"
                    )
                scaling = _longrope(p, size(_ORIGINAL, inside or k.size(_POSITIONS)), k)
            case found:
                raise UnsupportedModel(
                    f"config.json: rope type is {', '.join(found)}; the decoder supports default, "
                    "linear, llama3 and longrope"
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
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
