"""Reads and writes the keys of Granite 3 and of the dense models of Granite 4."""

from __future__ import annotations

from selm_jax.models.config import DecoderConfig, LayerKind, UnsupportedModel
from selm_jax.models.config_keys import Json, Keys
from selm_jax.models.config_layers import all_alike, biases_from, biases_to
from selm_jax.models.config_rope import rope_from, rope_to


def _multipliers_from(k: Keys) -> Json:
    return {
        "embed_scale": k.number("embedding_multiplier", 1.0),
        "query_scale": k.number("attention_multiplier", 1.0),
        "residual_scale": k.number("residual_multiplier", 1.0),
        "logit_divisor": k.number("logits_scaling", 1.0),
    }


def _multipliers_to(c: DecoderConfig) -> Json:
    return {
        "embedding_multiplier": c.embed_scale,
        "attention_multiplier": c.query_scale,
        "residual_multiplier": c.residual_scale,
        "logits_scaling": c.logit_divisor,
    }


def granite_from(k: Keys, c: Json) -> Json:
    return _multipliers_from(k) | biases_from(k) | all_alike(c, rope_from(k, 1e4))


def granite_to(c: DecoderConfig) -> Json:
    return _multipliers_to(c) | biases_to(c) | rope_to(c.kinds[0].rope)


# Keys of the layers that a dense model does not have.
_OF_HYBRIDS = (
    "num_experts_per_tok", "mamba_n_heads", "mamba_n_groups", "mamba_d_state", "mamba_d_head",
    "mamba_d_conv", "mamba_expand", "mamba_chunk_size", "mamba_conv_bias", "mamba_proj_bias",
    "time_step_limit", "init_method",
)  # fmt: skip


def granite4_from(k: Keys, c: Json) -> Json:
    n = c["layers"]
    types = k.texts("layer_types") or k.texts("layers_block_type") or ["mamba"] * n
    others = [t for t in types if t not in ("attention", "full_attention")]
    if others or len(types) != n:
        raise UnsupportedModel(
            f"config.json: layer_types has {len(others)} of {len(types)} layers that are not "
            f"attention ({', '.join(sorted(set(others)))}); the decoder has no state-space layers. "
            "Use a dense Granite 4 model, whose name has no `h`, such as granite-4.0-micro"
        )
    if k("num_local_experts", 8) not in (0, None):
        raise UnsupportedModel(
            "config.json: num_local_experts is not 0; the decoder has no experts beside an MLP "
            "that all tokens use. Use a dense Granite 4 model, such as granite-4.0-micro"
        )
    k.only("normalization_function", "rmsnorm")
    for key in _OF_HYBRIDS:
        k(key, None)
    rope = rope_from(k, 1e4)
    if k("position_embedding_type", None) != "rope":  # as in transformers, whatever else it is
        rope = None
    bias = k.flag("attention_bias")
    return {
        **_multipliers_from(k),
        "mlp": k.size("shared_intermediate_size", 1024),
        "qkv_bias": bias,
        "out_bias": bias,
        "kinds": (LayerKind(rope),) * n,
    }


def granite4_to(c: DecoderConfig) -> Json:
    rope = c.kinds[0].rope
    return {
        **_multipliers_to(c),
        "layer_types": ["attention"] * c.layers,
        "num_local_experts": 0,
        "shared_intermediate_size": c.mlp,
        "attention_bias": c.qkv_bias,
        "position_embedding_type": None if rope is None else "rope",
        "mamba_n_heads": 1,  # transformers compares it with the width, even if no layer uses it
        **({} if rope is None else rope_to(rope)),
    }
