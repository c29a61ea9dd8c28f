"""Reads the keys of a GGUF file that only one family has, and completes config.json from them.

Each function takes a file's keys and the part of config.json that all families have alike. A fact
that llama.cpp keeps in its code, so that it is not in the file, is here with a comment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from selm_jax.weights.gguf_file import MEND, Fields, GGUFError

Json = dict[str, Any]


class Heads(NamedTuple):
    """The heads of attention: their numbers, the size of one, and how much of it rope rotates."""

    heads: int
    kv_heads: int
    head_dim: int
    rotated: int


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
    """Reads Granite 3, and the dense models of Granite 4, which are the same function."""
    for key in ("expert_count", "expert_used_count"):
        if k.get(key, int):
            raise GGUFError(
                f"{k.path}: key {k.prefix}{key} is {k.get(key, int)}, so this model has experts, "
                "which is not supported. Use a dense model, such as granite-4.0-micro"
            )
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


def gemma4_heads(k: Fields) -> Heads:
    """Reads the heads of layers with a window; the rotated size is that of the other layers."""
    whole = k.size("attention.key_length")
    sizes = {"": whole, "_swa": k.size("attention.key_length_swa", whole)}
    for mark, size in sizes.items():
        for key in (f"attention.value_length{mark}", f"rope.dimension_count{mark}"):
            if k.size(key, size) != size:
                raise GGUFError(
                    f"{k.path}: key {k.prefix}{key} is {k.size(key)}, but keys have the size "
                    f"{size}; only equal sizes are supported. {MEND}"
                )
    windowed, _ = _gemma4_kv_heads(k)
    return Heads(k.size("attention.head_count"), windowed, sizes["_swa"], sizes[""])


def _gemma4_kv_heads(k: Fields) -> tuple[int, int]:
    """The numbers of key/value heads in layers with a window, and in the others."""
    key, slides = "attention.head_count_kv", k.need("attention.sliding_window_pattern", list)
    said = k.need(key, object)
    each: list[Any] = said if isinstance(said, list) else [said] * len(slides)
    kinds = [{n for n, s in zip(each, slides, strict=False) if s is kind} for kind in (True, False)]
    counts = [kind.pop() if len(kind) == 1 else 0 for kind in kinds]
    if len(each) != len(slides) or not all(type(n) is int and n > 0 for n in counts):
        raise GGUFError(
            f"{k.path}: key {k.prefix}{key} is {said!r:.80}; expected one number for all layers "
            f"with a window, of which there is at least one, and one for all others. {MEND}"
        )
    return counts[0], counts[1]


def gemma4(k: Fields, config: Json) -> Json:
    for key, what in (
        ("embedding_length_per_layer_input", "embeddings of its own in each layer (E2B, E4B)"),
        ("attention.shared_kv_layers", "layers that use the keys of earlier ones (E2B, E4B)"),
    ):
        if k.get(key, int):
            raise GGUFError(
                f"{k.path}: key {k.prefix}{key} is {k.get(key, int)}: this model has {what}, which "
                "is not supported. Use a dense model, such as gemma-4-31B-it"
            )
    theta, full = config.pop("rope_theta"), config.pop("rope_scaling")
    types, cap = _layer_types(k, config, 6), "final_logit_softcapping"
    if types[-1] != "full_attention":
        raise GGUFError(
            f"{k.path}: key {k.prefix}attention.sliding_window_pattern gives the last layer a "
            f"window, which no gemma4 model has. {MEND}"
        )
    return config | {
        cap: k.number(cap) if cap in k else None,
        "global_head_dim": k.size("attention.key_length"),
        "hidden_size_per_layer_input": 0,
        "layer_types": types,
        "num_global_key_value_heads": _gemma4_kv_heads(k)[1],
        "rope_parameters": {
            "full_attention": {"rope_type": "default"} | (full or {}) | {"rope_theta": theta},
            "sliding_attention": {
                "rope_type": "default",
                "rope_theta": k.number("rope.freq_base_swa", theta),
            },
        },
        "sliding_window": k.size("attention.sliding_window"),
    }


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
