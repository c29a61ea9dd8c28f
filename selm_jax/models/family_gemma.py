"""Reads and writes the keys of Gemma's lineage; see `family_llama` for the others."""

from __future__ import annotations

from selm_jax.models.config import (
    DecoderConfig,
    Heads,
    LayerKind,
    Proportional,
    Rope,
    UnsupportedModel,
)
from selm_jax.models.config_keys import Json, Keys, is_off, size
from selm_jax.models.config_layers import (
    all_alike,
    alternating,
    kinds_of,
    layer_types_to,
    ropes_by_type,
    windows_of,
)
from selm_jax.models.config_rope import parameters_to, rope_from, rope_of, rope_to


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


# --- Gemma 4 --------------------------------------------------------------------------------------

_FULL, _SLIDING = "full_attention", "sliding_attention"
_GEMMA_4_ROPES: Json = {
    _FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    _SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}


def gemma4_from(k: Keys, c: Json) -> Json:
    _refuse_more_than_dense(k)
    k.only("attention_bias", False, None)
    k.only("use_bidirectional_attention", None, "vision")  # the tokens of an image see each other
    types = k.texts("layer_types")
    if types is None:  # the last layer always has full attention
        types = [*alternating(c["layers"], 6)[:-1], _FULL]
    if types[-1:] != [_FULL]:
        raise UnsupportedModel(
            f"config.json: layer_types ends with {types[-1:]!r:.60}; expected {_FULL}, to which "
            "transformers changes the last layer of a gemma4 model. Correct the file"
        )
    window = k.size("sliding_window", 512)
    windows = windows_of(types, window, c["layers"])
    ropes, full = _gemma4_ropes(k), _heads_of_full_layers(k, c, types)
    return {
        "qk_norm": "head",
        "value_norm": True,
        "post_norms": True,
        "layer_scale": True,
        "embed_scale": c["embed"] ** 0.5,
        "query_scale": 1.0,
        "kinds": tuple(
            LayerKind(ropes[t], w, full if t == _FULL else None)
            for t, w in zip(types, windows, strict=True)
        ),
        "logit_cap": k.number("final_logit_softcapping", None),
    }


def _refuse_more_than_dense(k: Keys) -> None:
    """Raises UnsupportedModel for the parts that only some models of the family have."""
    k("vocab_size_per_layer_input", None)  # matters only if layers have embeddings of their own
    for key, default, what in (
        ("hidden_size_per_layer_input", 256, "embeddings of its own in each layer (E2B, E4B)"),
        ("num_kv_shared_layers", 0, "layers that use the keys of earlier ones (E2B, E4B)"),
        ("use_double_wide_mlp", False, "wider MLPs in such layers (E2B)"),
        ("enable_moe_block", False, "a mixture of experts beside the MLP (26B-A4B)"),
    ):
        if not is_off(found := k(key, default)):
            raise UnsupportedModel(
                f"config.json: {key} is {found!r:.60}: this gemma4 model has {what}, and the "
                "decoder does not. Use a dense model, such as gemma-4-31B-it"
            )


def _gemma4_ropes(k: Keys) -> dict[str, Rope]:
    for key in ("rope_theta", "rope_scaling"):  # of earlier families; transformers ignores them
        k.only(key, None)
    nested = k.object("rope_parameters", _GEMMA_4_ROPES)
    bases = [each.get("rope_theta") for each in nested.values() if isinstance(each, dict)]
    if set(nested) != {_FULL, _SLIDING} or len(bases) != 2 or None in bases:
        raise UnsupportedModel(
            f"config.json: rope_parameters is {nested!r:.200}; expected one object for {_FULL} and "
            f"one for {_SLIDING}, each with its rope_theta"
        )
    ropes = {name: rope_of(nested[name], 1e4, k) for name in (_FULL, _SLIDING)}
    for name, rope in ropes.items():
        if not isinstance(rope.scaling, Proportional | None):
            raise UnsupportedModel(
                f"config.json: rope_parameters has rope_type {nested[name].get('rope_type')!r} for "
                f"{name}; a gemma4 model has default or proportional. Use another model"
            )
    return ropes


def _heads_of_full_layers(k: Keys, c: Json, types: list[str]) -> Heads | None:
    """Reads the heads of layers with full attention; None if all layers have the same heads.

    The published files have a key for each of two numbers. transformers from 5.24 on writes both
    into an object for each layer.
    """
    shared, each = k.flag("attention_k_eq_v"), k.object("per_layer_config", None)
    if each is None:
        dim, count = k.size("global_head_dim", 512), k.size("num_global_key_value_heads", None)
    else:
        for key in ("global_head_dim", "num_global_key_value_heads"):  # ignored beside the object
            k.only(key, None)
        dim, count = _same_in_full_layers(each, types)
    own = Heads(count or c["kv_heads"], dim or c["head_dim"], shared)
    if own.kv_heads != c["kv_heads"] and not shared:
        raise UnsupportedModel(
            f"config.json: layers with full attention have {own.kv_heads} key-value heads, but "
            "attention_k_eq_v is not true, and then programs disagree on their number. Use "
            "another model"
        )
    return None if own == Heads(c["kv_heads"], c["head_dim"], False) else own


def _same_in_full_layers(each: Json, types: list[str]) -> tuple[int | None, int | None]:
    """Reads head_dim and num_key_value_heads from `per_layer_config`; None for those of all."""
    full = [i for i, name in enumerate(types) if name == _FULL]
    of_layer = {int(i): each[i] for i in each if i.isdecimal()}
    own = of_layer.get(full[0], {})
    keys = "head_dim", "num_key_value_heads"
    same = {i: own for i in full} if own else {}
    fine = isinstance(own, dict) and set(own) <= set(keys)
    if not fine or len(of_layer) < len(each) or of_layer != same:
        raise UnsupportedModel(
            f"config.json: per_layer_config is {each!r:.200}; expected the same head_dim and "
            f"num_key_value_heads for each layer with {_FULL}, by its number, and none for others"
        )
    dim, count = (None if key not in own else size(key, own[key]) for key in keys)
    return dim, count


def gemma4_to(c: DecoderConfig) -> Json:
    hf, full = layer_types_to(c), c.of(c.kinds[-1])
    ropes = {_FULL: Rope(1e6), _SLIDING: Rope(1e4)}  # of a kind of which there is no layer
    ropes |= dict(zip(hf["layer_types"], (kind.rope for kind in c.kinds), strict=True))
    if hf["sliding_window"] is None:
        del hf["sliding_window"]
    return hf | {
        "attention_k_eq_v": full.keys_as_values,
        "global_head_dim": full.head_dim,
        "num_global_key_value_heads": full.kv_heads if full.keys_as_values else None,
        "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": c.logit_cap,
        "rope_parameters": {name: parameters_to(rope) for name, rope in ropes.items()},
    }
