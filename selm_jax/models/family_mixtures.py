"""Reads and writes the keys of mixtures of experts: Mixtral, Qwen3-MoE and gpt-oss.

For each family, two functions side by side read and write the keys that not all families share.
"""

from __future__ import annotations

from selm_jax.models.config import Clamp, DecoderConfig, Mixture, UnsupportedModel
from selm_jax.models.config_keys import Json, Keys
from selm_jax.models.config_layers import (
    all_alike,
    alternating,
    kinds_of,
    layer_types_to,
    window_if,
)
from selm_jax.models.config_rope import parameters_to, rope_from, rope_of, rope_to


def mixtral_from(k: Keys, c: Json) -> Json:
    mixture = Mixture(k.size("num_local_experts", 8), k.size("num_experts_per_tok", 2), True)
    window = k.size("sliding_window", None)
    return {"mixture": mixture} | all_alike(c, rope_from(k, 1e6), window)


def mixtral_to(c: DecoderConfig) -> Json:
    assert c.mixture is not None
    return {
        "num_local_experts": c.mixture.experts,
        "num_experts_per_tok": c.mixture.active,
        "sliding_window": c.kinds[0].window,
    } | rope_to(c.kinds[0].rope)


def qwen3_moe_from(k: Keys, c: Json) -> Json:
    if k("mlp_only_layers", None) not in (None, []) or k.size("decoder_sparse_step", 1) != 1:
        raise UnsupportedModel(
            "config.json: mlp_only_layers or decoder_sparse_step gives some layers an MLP in place "
            "of experts; the decoder needs experts in every layer. Use another model"
        )
    # transformers 5 writes the number of experts under the second name.
    names = [n for n in ("num_experts", "num_local_experts") if k(n, None) is not None]
    counts = {k.size(name) for name in names} or {128}
    if len(counts) > 1:
        raise UnsupportedModel(
            f"config.json: num_experts and num_local_experts are different numbers, {counts}. "
            "Remove the wrong one"
        )
    k("max_window_layers", None)  # a key of Qwen's dense models; transformers ignores it here
    bias = k.flag("attention_bias")
    return {
        "mlp": k.size("moe_intermediate_size", 768),
        "mixture": Mixture(
            counts.pop(), k.size("num_experts_per_tok", 8), k.flag("norm_topk_prob")
        ),
        "qk_norm": "head",
        "qkv_bias": bias,
        "out_bias": bias,
    } | all_alike(c, rope_from(k, 1e4), window_if(k, 4096))


def qwen3_moe_to(c: DecoderConfig) -> Json:
    assert c.mixture is not None
    window = c.kinds[0].window
    return {
        "num_experts": c.mixture.experts,
        "num_experts_per_tok": c.mixture.active,
        "norm_topk_prob": c.mixture.normalized,
        "moe_intermediate_size": c.mlp,
        "attention_bias": c.qkv_bias,
        "sliding_window": window,
        "use_sliding_window": window is not None,
    } | rope_to(c.kinds[0].rope)


_GPT_OSS_ROPE: Json = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def gpt_oss_from(k: Keys, c: Json) -> Json:
    method = k.object("quantization_config").get("quant_method", "mxfp4")
    if method != "mxfp4":
        raise UnsupportedModel(
            f"config.json: quantization_config has quant_method {method!r:.60}; a gpt_oss model "
            "may have mxfp4 weights or weights that are not quantised. Use such a copy"
        )
    active = k.size("num_experts_per_tok", 4)
    # OpenAI's own names for two facts, which the published files have beside transformers' names.
    k.only("experts_per_token", active, None)
    theta = k.number("rope_theta", None) or 1.5e5
    parameters = k.object("rope_parameters") or k.object("rope_scaling") or _GPT_OSS_ROPE
    k.only("initial_context_length", parameters.get("original_max_position_embeddings"), None)
    rope = rope_of(parameters, theta, k)
    types = k.texts("layer_types") or alternating(c["layers"], 2)
    ropes = {"full_attention": rope, "sliding_attention": rope}
    bias = k.flag("attention_bias", True)
    return {
        "mixture": Mixture(
            k.size("num_local_experts", 128),
            active,
            True,
            biases=True,
            clamp=Clamp(k.number("swiglu_alpha", 1.702), k.number("swiglu_limit", 7.0)),
        ),
        "sinks": True,
        "qkv_bias": bias,
        "out_bias": bias,
        "kinds": kinds_of(types, k.size("sliding_window", 128, null=True), ropes, c),
    }


def gpt_oss_to(c: DecoderConfig) -> Json:
    assert c.mixture is not None and c.mixture.clamp is not None
    rope = c.kinds[0].rope
    assert rope is not None
    # Without any scaling, transformers would take yarn, which is the default of this family.
    said = rope_to(rope) if rope.scaling else {"rope_parameters": parameters_to(rope)}
    return (
        {
            "num_local_experts": c.mixture.experts,
            "num_experts_per_tok": c.mixture.active,
            "swiglu_alpha": c.mixture.clamp.alpha,
            "swiglu_limit": c.mixture.clamp.limit,
            "attention_bias": c.qkv_bias,
        }
        | layer_types_to(c)
        | said
    )
