"""Reads and writes the keys of Gemma's lineage; see `family_llama` for the others."""

from __future__ import annotations

from selm_jax.models.config import DecoderConfig, LayerKind
from selm_jax.models.config_keys import Json, Keys
from selm_jax.models.config_layers import (
    all_alike,
    alternating,
    kinds_of,
    layer_types_to,
    ropes_by_type,
    windows_of,
)
from selm_jax.models.config_rope import rope_from, rope_to


def gemma_from(k: Keys, c: Json) -> Json:
    k.only("hidden_activation", None, "gelu_pytorch_tanh")  # hidden_act says the same
    return _every_gemma_from(k, c) | all_alike(c, rope_from(k, 1e4))


def gemma_to(c: DecoderConfig) -> Json:
    return rope_to(c.kinds[0].rope)


def _every_gemma_from(k: Keys, c: Json) -> Json:
    k.only("attention_bias", False, None)
    k.only("use_bidirectional_attention", None, False)
    return {"norm_offset": 1.0, "embed_scale": c["embed"] ** 0.5}


def _gemma_from(k: Keys, c: Json) -> Json:
    """The fields of `DecoderConfig` that Gemma 2 and 3 have in common."""
    return _every_gemma_from(k, c) | {
        "post_norms": True,
        "query_scale": k.number("query_pre_attn_scalar", 256) ** -0.5,
    }


def _gemma_to(c: DecoderConfig) -> Json:
    assert c.query_scale is not None
    scalar = c.query_scale**-2
    return {
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "attn_logit_softcapping": c.attention_cap,
        "final_logit_softcapping": c.logit_cap,
    }


def gemma2_from(k: Keys, c: Json) -> Json:
    n = c["layers"]
    types = k.texts("layer_types") or alternating(n, 2)
    window = k.size("sliding_window", 4096, null=True)
    k.only("sliding_window_size", window, None)  # the same once more, as 9B and 27B have it
    windows = windows_of(types, window, n)
    rope = rope_from(k, 1e4)
    return _gemma_from(k, c) | {
        "kinds": tuple(LayerKind(rope, window) for window in windows),
        "attention_cap": k.number("attn_logit_softcapping", 50.0, null=True),
        "logit_cap": k.number("final_logit_softcapping", 30.0, null=True),
    }


def gemma2_to(c: DecoderConfig) -> Json:
    return _gemma_to(c) | layer_types_to(c) | rope_to(c.kinds[0].rope)


def gemma3_from(k: Keys, c: Json) -> Json:
    n = c["layers"]
    said, kept = (k.size(f"{mark}sliding_window_pattern", None) for mark in ("", "_"))
    every = said or kept or 6
    types = k.texts("layer_types") or alternating(n, every)
    window = k.size("sliding_window", 4096, null=True)
    ropes = ropes_by_type(
        k,
        full=k.number("rope_theta", None) or 1e6,
        sliding=k.number("rope_local_base_freq", None) or 1e4,
    )
    return _gemma_from(k, c) | {
        "qk_norm": "head",
        "kinds": kinds_of(types, window, ropes, c),
        "attention_cap": k.number("attn_logit_softcapping", None),
        "logit_cap": k.number("final_logit_softcapping", None),
    }


def gemma3_to(c: DecoderConfig) -> Json:
    hf = _gemma_to(c) | layer_types_to(c)
    ropes = {kind.window is not None: kind.rope for kind in c.kinds}
    if (local := ropes.get(True)) is not None:
        hf["rope_local_base_freq"] = local.theta
    return hf | (rope_to(ropes[False]) if False in ropes else {})
