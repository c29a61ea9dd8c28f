"""Reads and writes the keys of Llama's lineage: models whose blocks are built like Llama's.

For each family, two functions side by side read and write the keys that not all families share.
"""

from __future__ import annotations

from selm_jax.models.config import DecoderConfig, Growth, LayerKind, LongRope, UnsupportedModel
from selm_jax.models.config_keys import Json, Keys, number, size
from selm_jax.models.config_layers import (
    all_alike,
    alternating,
    biases_from,
    biases_to,
    kinds_of,
    layer_types_to,
    ropes_by_type,
    switched_windows_to,
    upper_windows,
    window_if,
    windows_of,
)
from selm_jax.models.config_rope import (
    magnitude_of,
    parameters_to,
    rope_from,
    rope_of,
    rope_to,
    rotary_fraction,
)


def llama_from(k: Keys, c: Json) -> Json:
    return biases_from(k) | all_alike(c, rope_from(k, 1e4))


def llama_to(c: DecoderConfig) -> Json:
    return biases_to(c) | rope_to(c.kinds[0].rope)


def mistral_from(k: Keys, c: Json) -> Json:
    # Without the key, a Mistral config has transformers' default window, so it does have one.
    return all_alike(c, rope_from(k, 1e4), k.size("sliding_window", 4096, null=True))


def mistral_to(c: DecoderConfig) -> Json:
    return {"sliding_window": c.kinds[0].window} | rope_to(c.kinds[0].rope)


_MINISTRAL_3: Json = {
    "type": "yarn",
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def ministral3_from(k: Keys, c: Json) -> Json:
    parameters = dict(k.object("rope_parameters", _MINISTRAL_3))
    parameters.pop("max_position_embeddings", None)  # nothing reads it there
    rate = parameters.pop("llama_4_scaling_beta", None)
    every = parameters.get("original_max_position_embeddings")
    if rate is None or every is None:
        raise UnsupportedModel(
            "config.json: rope_parameters has no llama_4_scaling_beta or no "
            "original_max_position_embeddings, by which the queries of a ministral3 model grow. "
            "Add them, as in the config.json at the model's source"
        )
    growth = Growth(
        0.0 if rate == 0 and rate is not False else number("llama_4_scaling_beta", rate),
        size("original_max_position_embeddings", every),
    )
    rope = rope_of(parameters, k.number("rope_theta", None) or 1e6, k)
    return {"query_growth": growth} | all_alike(c, rope, k.size("sliding_window", None))


def ministral3_to(c: DecoderConfig) -> Json:
    assert c.query_growth is not None
    return {
        "sliding_window": c.kinds[0].window,
        "rope_parameters": {
            **parameters_to(c.kinds[0].rope),
            "original_max_position_embeddings": c.query_growth.every,
            "llama_4_scaling_beta": c.query_growth.rate,
        },
    }


def phi3_from(k: Keys, c: Json) -> Json:
    k.only("attention_bias", False, None)
    for key in ("full_attn_mod", "interpolate_factor"):  # of Phi-4-mini's own code
        k.only(key, 1, None)
    fraction = rotary_fraction(k)
    rope = rope_from(k, 1e4, fraction, original=4096)
    if not isinstance(rope.scaling, LongRope | None):
        raise UnsupportedModel(
            f"config.json: rope type is {type(rope.scaling).__name__.lower()}; a phi3 model has "
            "default or longrope. Use another model"
        )
    return {"rotary_fraction": fraction} | all_alike(c, rope, k.size("sliding_window", None))


def phi3_to(c: DecoderConfig) -> Json:
    rope = c.kinds[0].rope
    hf: Json = {"sliding_window": c.kinds[0].window} | rope_to(rope)
    if rope is not None and isinstance(rope.scaling, LongRope):
        original = rope.scaling.original
        # Earlier versions of transformers accept only these three keys under rope_scaling.
        if rope.scaling.magnitude == magnitude_of(c.max_positions / original, original):
            for key in ("original_max_position_embeddings", "attention_factor"):
                del hf["rope_scaling"][key]
        hf["original_max_position_embeddings"] = original
    return hf | ({} if c.rotary_fraction == 1 else {"partial_rotary_factor": c.rotary_fraction})


def qwen2_from(k: Keys, c: Json) -> Json:
    return {"qkv_bias": True} | upper_windows(k, c, rope_from(k, 1e4))


def qwen2_to(c: DecoderConfig) -> Json:
    return switched_windows_to(c) | rope_to(c.kinds[0].rope)


def qwen3_from(k: Keys, c: Json) -> Json:
    bias = k.flag("attention_bias")
    biases = {"qkv_bias": bias, "out_bias": bias}
    return {"qk_norm": "head"} | biases | upper_windows(k, c, rope_from(k, 1e4))


def qwen3_to(c: DecoderConfig) -> Json:
    return {"attention_bias": c.qkv_bias} | switched_windows_to(c) | rope_to(c.kinds[0].rope)


def smollm3_from(k: Keys, c: Json) -> Json:
    n = c["layers"]
    every = k.size("no_rope_layer_interval", 4)
    has_rope = k("no_rope_layers", None) or [(i + 1) % every != 0 for i in range(n)]
    if not isinstance(has_rope, list) or len(has_rope) != n or not set(map(str, has_rope)) <= _BITS:
        raise UnsupportedModel(
            f"config.json: no_rope_layers is {has_rope!r:.60}; expected a list of {n} zeros and "
            "ones"
        )
    rope = rope_from(k, 2e6)
    types = k.texts("layer_types")
    window = window_if(k, None)
    k("max_window_layers", None)  # a key of Qwen in the published files; this family ignores it
    if types is None:  # transformers' rule: the layers without rope slide
        types = ["full_attention" if has_rope[i] else "sliding_attention" for i in range(n)]
    windows = windows_of(types, window, n)
    kinds = tuple(LayerKind(rope if has_rope[i] else None, windows[i]) for i in range(n))
    return {"kinds": kinds} | biases_from(k)


# How JSON marks layers with and without rotary embeddings.
_BITS = {"0", "1", "True", "False"}


def smollm3_to(c: DecoderConfig) -> Json:
    rope = next(kind.rope for kind in c.kinds if kind.rope)
    return (
        {"no_rope_layers": [int(kind.rope is not None) for kind in c.kinds]}
        | biases_to(c)
        | switched_windows_to(c)
        | rope_to(rope)
    )


def olmo2_from(k: Keys, c: Json) -> Json:
    return _olmo_from(k) | all_alike(c, rope_from(k, 1e4))


def olmo2_to(c: DecoderConfig) -> Json:
    return {"attention_bias": c.qkv_bias} | rope_to(c.kinds[0].rope)


def _olmo_from(k: Keys) -> Json:
    bias = k.flag("attention_bias")
    biases = {"qkv_bias": bias, "out_bias": bias}
    return {"qk_norm": "projection", "pre_norms": False, "post_norms": True} | biases


def olmo3_from(k: Keys, c: Json) -> Json:
    theta = k.number("rope_theta", None) or 5e5
    nested = [k.object("rope_parameters").get(f"{kind}_attention") for kind in ("full", "sliding")]
    said = all(isinstance(each, dict) and each.get("rope_theta") for each in nested)
    if theta != 5e5 and not said:
        raise UnsupportedModel(
            f"config.json: rope_theta is {theta:g} in an olmo3 model, and versions of transformers "
            "disagree on whether the layers with a window have it, too. Write rope_parameters with "
            "the rope_theta of full_attention and of sliding_attention"
        )
    types = k.texts("layer_types") or alternating(c["layers"], 4)
    ropes = ropes_by_type(k, full=theta, sliding=theta)
    return _olmo_from(k) | {"kinds": kinds_of(types, k.size("sliding_window", 4096), ropes, c)}


def olmo3_to(c: DecoderConfig) -> Json:
    hf = layer_types_to(c)
    ropes = dict(zip(hf["layer_types"], (kind.rope for kind in c.kinds), strict=True))
    nested = {name: parameters_to(rope) for name, rope in ropes.items()}
    return {"attention_bias": c.qkv_bias, "rope_parameters": nested} | hf


def exaone4_from(k: Keys, c: Json) -> Json:
    window = k.size("sliding_window", 4096, null=True)
    types, pattern = k.texts("layer_types"), k("sliding_window_pattern", 4)
    if types is None and window is None:
        types = ["full_attention"] * c["layers"]
    elif types is None:  # the published files have both a pattern such as "LLLG" and the types
        types = alternating(c["layers"], size("sliding_window_pattern", pattern))
    if window is not None and "sliding_attention" not in types:
        raise UnsupportedModel(
            f"config.json: sliding_window is {window}, but layer_types has no sliding_attention, "
            "so no layer would have rope. Set sliding_window to null"
        )
    rope = rope_from(k, 1e4)
    kinds = tuple(  # beside layers with a window, those without one have no rope
        LayerKind(None if w is None and window is not None else rope, w)
        for w in windows_of(types, window, c["layers"])
    )
    return {"qk_norm": "head", "pre_norms": False, "post_norms": True, "kinds": kinds}


def exaone4_to(c: DecoderConfig) -> Json:
    return layer_types_to(c) | rope_to(next(kind.rope for kind in c.kinds if kind.rope))


def glm4_from(k: Keys, c: Json) -> Json:
    fraction = rotary_fraction(k, 0.5)
    return {
        "rotary_fraction": fraction,
        "rotary_pairs": "neighbours",
        "qkv_bias": k.flag("attention_bias", True),
        "post_norms": True,
    } | all_alike(c, rope_from(k, 1e4, fraction))


def glm4_to(c: DecoderConfig) -> Json:
    return {
        "attention_bias": c.qkv_bias,
        "partial_rotary_factor": c.rotary_fraction,
    } | rope_to(c.kinds[0].rope)
