"""Reads how a GGUF file stretches rotary embeddings, from its keys and its tensors of divisors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from selm_jax.models.config_rope import magnitude_of
from selm_jax.weights.gguf_families import Family
from selm_jax.weights.gguf_file import MEND, Fields, Gguf, GGUFError, numbers_of

Json = dict[str, Any]

FACTORS, SHORT, LONG = (
    f"rope_{name}.weight" for name in ("freqs", "factors_short", "factors_long")
)
"""Divisors of rope's frequencies: of Llama 3's kin one table, of LongRoPE one for short texts and
one for long ones."""


def rope_scaling(k: Fields, model: Gguf, family: Family, config: Json, rotated: int) -> Json | None:
    """The content of `rope_scaling`, from keys and from the tensors of divisors."""
    tables = {name: _table(k, model, name, rotated) for name in (FACTORS, SHORT, LONG)}
    found = [name for name, table in tables.items() if table is not None]
    kind, magnitude = k.get("rope.scaling.type", str), k.number("rope.scaling.attn_factor", 1.0)
    factor = k.number("rope.scaling.factor", 1.0, zero=True) or 1.0  # in llama.cpp, 0 means 1
    if found and factor != 1 and kind != "none":
        raise GGUFError(
            f"{k.path}: key {k.prefix}rope.scaling.factor is {factor:g}, but the file also has the "
            f"tensors of divisors {found}; beside them only 1 is supported. {MEND}"
        )
    if kind is None and factor != 1:
        kind = "linear"  # llama.cpp's default
    if kind == "none":
        kind = None
    if family.name == "phi3" and found == [SHORT, LONG] and kind in (None, "longrope"):
        most = config["max_position_embeddings"]
        original = k.size("rope.scaling.original_context_length", most)
        # Without a magnitude, config.json means this one. The file has it in float32.
        usual = math.isclose(magnitude, magnitude_of(most / original, original), rel_tol=1e-6)
        return {
            "rope_type": "longrope",
            "short_factor": tables[SHORT],
            "long_factor": tables[LONG],
        } | ({} if usual else {"attention_factor": magnitude})
    if magnitude != 1:
        raise GGUFError(
            f"{k.path}: key {k.prefix}rope.scaling.attn_factor is {magnitude:g}; only 1 is "
            f"supported here. {MEND}"
        )
    if family.name == "gemma4" and kind is None and found == [FACTORS]:
        return _proportional(k.path, tables[FACTORS] or [])
    match kind, found:
        case None, []:
            return None
        case None, [name] if name == FACTORS:
            return _llama3(k.path, np.asarray(tables[name], np.float32), config)
        case "linear", []:
            return {"rope_type": "linear", "factor": k.number("rope.scaling.factor")}
        case "yarn", []:
            optional = {
                "attention_factor": "rope.scaling.yarn_attn_factor",
                "beta_fast": "rope.scaling.yarn_beta_fast",
                "beta_slow": "rope.scaling.yarn_beta_slow",
            }
            return {
                "rope_type": "yarn",
                "factor": k.number("rope.scaling.factor"),
                "original_max_position_embeddings": k.size("rope.scaling.original_context_length"),
            } | {name: k.number(key) for name, key in optional.items() if key in k}
    raise GGUFError(
        f"{k.path}: key {k.prefix}rope.scaling.type is {kind!r} and the tensors of divisors are "
        f"{found}; supported are linear and yarn without such a tensor, and the tensor {FACTORS} "
        "without a type. Get the model as a Hugging Face folder (safetensors) instead"
    )


def _table(k: Fields, model: Gguf, name: str, rotated: int) -> list[float] | None:
    """The numbers of a tensor of divisors as the shortest decimals; None if there is no such."""
    for tensor in model.tensors:
        if tensor.name == name:
            values = numbers_of(model.file_of[name], tensor)
            if values.shape != (rotated // 2,):
                raise GGUFError(
                    f"{k.path}: tensor {name} has shape {values.shape}; expected {rotated // 2} "
                    f"numbers, half of the head size. {MEND}"
                )
            return [float(str(value)) for value in values]
    return None


def _proportional(path: Path, divisors: list[float]) -> Json:
    """The settings of Gemma 4's rope in layers with full attention: which pairs are rotated.

    llama.cpp divides the frequencies of the other pairs by a number that leaves nothing of them.
    """
    rotated = divisors.count(1.0)
    if divisors != [1.0] * rotated + [1e30] * (len(divisors) - rotated) or not rotated:
        raise GGUFError(
            f"{path}: tensor {FACTORS} has other numbers than 1 for the pairs that are rotated, "
            f"and 1e30 for those after them. {MEND}"
        )
    return {"rope_type": "proportional", "partial_rotary_factor": rotated / len(divisors)}


def _llama3(path: Path, factors: Float[np.ndarray, " pairs"], config: Json) -> Json | None:
    """The settings of Llama 3's rope, from the divisors of frequencies that they give.

    llama.cpp stores only these divisors. We assume the settings of Llama 3.1, 3.2 and 3.3, which
    differ only in `factor`, compute their divisors, and compare them with those in the file.
    """
    if np.all(factors == 1):
        return None
    guess = {
        "rope_type": "llama3",
        "factor": float(factors.max()),
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    expected = _llama3_divisors(guess, config["rope_theta"], config["head_dim"])
    if not np.allclose(factors, expected, rtol=1e-4, atol=0):
        raise GGUFError(
            f"{path}: tensor {FACTORS} has divisors of rope's frequencies that differ from "
            f"those of Llama 3.1 to 3.3 (factor {guess['factor']:g}) and are not supported. "
            "Get the model as a Hugging Face folder (safetensors) instead"
        )
    return guess


def _llama3_divisors(scaling: Json, theta: float, head_dim: int) -> Float[np.ndarray, " pairs"]:
    wavelengths = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    turns = scaling["original_max_position_embeddings"] / wavelengths
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / (kept + (1 - kept) / scaling["factor"])
