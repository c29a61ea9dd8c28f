"""Reads and writes the keys of mixtures of experts: Mixtral and Qwen3-MoE.

For each family, two functions side by side read and write the keys that not all families share.
"""

from __future__ import annotations

from selm_jax.models.config import DecoderConfig, Mixture, UnsupportedModel
from selm_jax.models.config_keys import Json, Keys
from selm_jax.models.config_layers import all_alike, window_if
from selm_jax.models.config_rope import rope_from, rope_to


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
