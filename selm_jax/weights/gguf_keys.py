"""Reads the keys of a GGUF file that only one family has, and completes config.json from them.

Each function takes a file's keys and the part of config.json that all families have alike. A fact
that llama.cpp keeps in its code, so that it is not in the file, is here with a comment.
"""

from __future__ import annotations

from typing import Any

from selm_jax.weights.gguf_file import MEND, Fields, GGUFError

Json = dict[str, Any]


def _layer_types(k: Fields, config: Json, every: int) -> list[str]:
    """Which layers have a window; if the file does not say, all but one layer in `every`."""
    layers, key = config["num_hidden_layers"], "attention.sliding_window_pattern"
    slides = k.get(key, list) or [(i + 1) % every != 0 for i in range(layers)]
    if len(slides) != layers:
        raise GGUFError(
            f"{k.path}: key {k.prefix}{key} has {len(slides)} entries, but the model has {layers} "
            f"layers. {MEND}"
        )
    return ["sliding_attention" if slide else "full_attention" for slide in slides]


def mixtral(k: Fields, config: Json) -> Json:
    return config | {
        "num_local_experts": k.size("expert_count"),
        "num_experts_per_tok": k.size("expert_used_count"),
        "sliding_window": None,
    }


def ministral3(k: Fields, config: Json) -> Json:
    theta, yarn = config.pop("rope_theta"), config.pop("rope_scaling")
    return config | {
        "rope_parameters": (yarn or {})
        | {
            "rope_theta": theta,
            "mscale": 1.0,  # in llama.cpp's code
            # Each is off if it is 0, llama.cpp's default.
            "mscale_all_dim": k.number("rope.scaling.yarn_log_multiplier", 0.0, zero=True),
            "llama_4_scaling_beta": k.number("attention.temperature_scale", 0.0, zero=True),
        },
    }


def qwen3_moe(k: Fields, config: Json) -> Json:
    return config | {
        "num_experts": k.size("expert_count"),
        "num_experts_per_tok": k.size("expert_used_count"),
        "moe_intermediate_size": k.size("expert_feed_forward_length"),
    }


def olmo3(k: Fields, config: Json) -> Json:
    theta, full = config.pop("rope_theta"), config.pop("rope_scaling")
    swa = k.number("rope.freq_base_swa", theta)
    return config | {
        "layer_types": _layer_types(k, config, 4),
        "sliding_window": k.size("attention.sliding_window"),
        "rope_parameters": {
            "full_attention": {"rope_type": "default"} | (full or {}) | {"rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": swa},
        },
    }


def exaone4(k: Fields, config: Json) -> Json:
    window = k.get("attention.sliding_window", int) or None
    types = _layer_types(k, config, 4 if window else 1)
    return config | {"layer_types": types, "sliding_window": window}


def granite(k: Fields, config: Json) -> Json:
    if k.get("rope.scaling.finetuned", bool) is False:
        raise GGUFError(
            f"{k.path}: key {k.prefix}rope.scaling.finetuned is false, so this model has no rotary "
            "embedding, which is not supported. Use another model"
        )
    return config | {
        "attention_multiplier": k.number("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": k.number("embedding_scale", 1.0),
        "residual_multiplier": k.number("residual_scale", 1.0),
        "logits_scaling": k.number("logit_scale"),
    }


def gemma2(k: Fields, config: Json) -> Json:
    return config | {
        "query_pre_attn_scalar": _query_scalar(config, of_width=46),
        "attn_logit_softcapping": k.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": k.number("final_logit_softcapping", 30.0),
        "layer_types": _layer_types(k, config, 2),
        "sliding_window": k.size("attention.sliding_window"),
    }


def gemma3(k: Fields, config: Json) -> Json:
    cap = "final_logit_softcapping"
    window = k.get("attention.sliding_window", int) or None
    return config | {
        "query_pre_attn_scalar": _query_scalar(config, of_width=62),
        cap: k.number(cap) if cap in k else None,
        "layer_types": _layer_types(k, config, 6 if window else 1),
        "sliding_window": window,
        "rope_local_base_freq": k.number("rope.freq_base_swa", 10000.0),
    }


def _query_scalar(config: Json, of_width: int) -> int:
    """Returns the number by whose root queries are divided.

    It is the head size, or in the largest model (27B, of `of_width` layers) the width divided by
    the number of heads.
    """
    if config["num_hidden_layers"] == of_width:
        return config["hidden_size"] // config["num_attention_heads"]
    return config["head_dim"]


def phi3(k: Fields, config: Json) -> Json:
    # The window of config.json, or 0 for none. Files of early converters do not say it.
    window = k.need("attention.sliding_window", int) or None
    original = k.size("rope.scaling.original_context_length", config["max_position_embeddings"])
    return config | {
        "original_max_position_embeddings": original,
        "sliding_window": window,
    }


def gpt_oss(k: Fields, config: Json) -> Json:
    theta, yarn = config.pop("rope_theta"), config.pop("rope_scaling")
    if yarn is not None and yarn["rope_type"] == "yarn":
        # The slopes are llama.cpp's defaults. It rounds where they begin; OpenAI's code does not.
        yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False} | yarn
    return config | {
        "intermediate_size": k.size("expert_feed_forward_length", config["intermediate_size"]),
        "layer_types": _layer_types(k, config, 2),
        "num_experts_per_tok": k.size("expert_used_count"),
        "num_local_experts": k.size("expert_count"),
        "rope_parameters": {"rope_type": "default"} | (yarn or {}) | {"rope_theta": theta},
        "sliding_window": k.size("attention.sliding_window"),
    }
