"""The table of llama.cpp's architectures: their tensors, and their own keys.

llama.cpp keeps facts of some families in its code, so that they are not in the file: which layers
have a window if no key says so, which have no rotary embedding, and how attention is scaled. They
are here, with a comment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from selm_jax.weights.gguf_file import MEND, Fields, GGUFError

Json = dict[str, Any]
Tensors = dict[str, tuple[str, ...]]

# The tensors of a layer: for each name in the file, the Hugging Face name and the shape, by the
# names of sizes (`gguf_model.sizes_of`). `{}` is the number of an expert, the tensor's first axis.
_ATTENTION: Tensors = {
    "attn_q.weight": ("self_attn.q_proj.weight", "q", "hidden"),
    "attn_k.weight": ("self_attn.k_proj.weight", "kv", "hidden"),
    "attn_v.weight": ("self_attn.v_proj.weight", "kv", "hidden"),
    "attn_output.weight": ("self_attn.o_proj.weight", "hidden", "q"),
}
QKV_BIASES: Tensors = {
    "attn_q.bias": ("self_attn.q_proj.bias", "q"),
    "attn_k.bias": ("self_attn.k_proj.bias", "kv"),
    "attn_v.bias": ("self_attn.v_proj.bias", "kv"),
}
_NORMS_OF_HEADS: Tensors = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", "head"),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", "head"),
}
_NORMS_OF_PROJECTIONS: Tensors = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", "q"),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", "kv"),
}
_MLP: Tensors = {
    "ffn_gate.weight": ("mlp.gate_proj.weight", "inner", "hidden"),
    "ffn_up.weight": ("mlp.up_proj.weight", "inner", "hidden"),
    "ffn_down.weight": ("mlp.down_proj.weight", "hidden", "inner"),
}
_PHI3: Tensors = {
    "attn_qkv.weight": ("self_attn.qkv_proj.weight", "qkv", "hidden"),
    "attn_output.weight": ("self_attn.o_proj.weight", "hidden", "q"),
    "ffn_up.weight": ("mlp.gate_up_proj.weight", "gate_up", "hidden"),
    "ffn_down.weight": ("mlp.down_proj.weight", "hidden", "inner"),
}
_PRE_NORMS: Tensors = {
    "attn_norm.weight": ("input_layernorm.weight", "hidden"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "hidden"),
}
_POST_NORMS: Tensors = {
    "post_attention_norm.weight": ("post_attention_layernorm.weight", "hidden"),
    "post_ffw_norm.weight": ("post_feedforward_layernorm.weight", "hidden"),
}
_FOUR_NORMS: Tensors = _POST_NORMS | {
    "attn_norm.weight": ("input_layernorm.weight", "hidden"),
    "ffn_norm.weight": ("pre_feedforward_layernorm.weight", "hidden"),
}


_GLM4: Tensors = _ATTENTION | {
    "attn_norm.weight": ("input_layernorm.weight", "hidden"),
    "post_attention_norm.weight": ("post_self_attn_layernorm.weight", "hidden"),
    "ffn_norm.weight": ("post_attention_layernorm.weight", "hidden"),
    "post_ffw_norm.weight": ("post_mlp_layernorm.weight", "hidden"),
    "ffn_up.weight": ("mlp.gate_up_proj.weight", "gate_up", "hidden"),
    "ffn_down.weight": ("mlp.down_proj.weight", "hidden", "inner"),
}


def _experts(mlp: str, gate: str, up: str, down: str) -> Tensors:
    return {
        "ffn_gate_inp.weight": (f"{mlp}.gate.weight", "experts", "hidden"),
        "ffn_gate_exps.weight": (f"{mlp}.experts.{{}}.{gate}.weight", "experts", "one", "hidden"),
        "ffn_up_exps.weight": (f"{mlp}.experts.{{}}.{up}.weight", "experts", "one", "hidden"),
        "ffn_down_exps.weight": (f"{mlp}.experts.{{}}.{down}.weight", "experts", "hidden", "one"),
    }


@dataclass(frozen=True)
class Family:
    """The properties in which one family of models differs from the others.

    Attributes:
      name: llama.cpp's name of the architecture.
      model_class: the class in transformers.
      layer: the tensors of a layer.
      facts: keys of config.json that all models of the family have alike.
      own: completes config.json from the family's own keys in the file; None if it has none.
      keys: the names of these.
      interleaved: whether rows of query and key projections are in llama.cpp's own order.
      offset: a number that llama.cpp's converter adds to the scales of norms.
      factors: whether there may be a tensor with a divisor for each of rope's frequencies.
      partial: whether rope may rotate a part of each head only.
      biases: whether queries, keys and values may have biases.
    """

    name: str
    model_class: str
    layer: Tensors
    facts: Json = field(default_factory=dict)
    own: Callable[[Fields, Json], Json] | None = None
    keys: frozenset[str] = frozenset()
    interleaved: bool = False
    offset: float = 0.0
    factors: bool = False
    partial: bool = False
    biases: bool = False


# --- keys -----------------------------------------------------------------------------------------

_WINDOW = frozenset({"attention.sliding_window", "attention.sliding_window_pattern"})
_EXPERTS = frozenset({"expert_count", "expert_used_count", "expert_feed_forward_length"})


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


def _mixtral(k: Fields, config: Json) -> Json:
    return config | {
        "num_local_experts": k.size("expert_count"),
        "num_experts_per_tok": k.size("expert_used_count"),
        "sliding_window": None,
    }


def _ministral3(k: Fields, config: Json) -> Json:
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


def _qwen3_moe(k: Fields, config: Json) -> Json:
    return config | {
        "num_experts": k.size("expert_count"),
        "num_experts_per_tok": k.size("expert_used_count"),
        "moe_intermediate_size": k.size("expert_feed_forward_length"),
    }


def _olmo3(k: Fields, config: Json) -> Json:
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


def _exaone4(k: Fields, config: Json) -> Json:
    window = k.get("attention.sliding_window", int) or None
    types = _layer_types(k, config, 4 if window else 1)
    return config | {"layer_types": types, "sliding_window": window}


def _granite(k: Fields, config: Json) -> Json:
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


def _gemma2(k: Fields, config: Json) -> Json:
    return config | {
        "query_pre_attn_scalar": _query_scalar(config, of_width=46),
        "attn_logit_softcapping": k.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": k.number("final_logit_softcapping", 30.0),
        "layer_types": _layer_types(k, config, 2),
        "sliding_window": k.size("attention.sliding_window"),
    }


def _gemma3(k: Fields, config: Json) -> Json:
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


def _phi3(k: Fields, config: Json) -> Json:
    # The window of config.json, or 0 for none. Files of early converters do not say it.
    window = k.need("attention.sliding_window", int) or None
    original = k.size("rope.scaling.original_context_length", config["max_position_embeddings"])
    return config | {
        "original_max_position_embeddings": original,
        "sliding_window": window,
    }


# --- the table ------------------------------------------------------------------------------------

_DENSE = _ATTENTION | _MLP | _PRE_NORMS
_CAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
_SCALES = frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"})

_BIASES: Json = {"attention_bias": False, "mlp_bias": False}
_QWEN3: Json = {"attention_bias": False, "use_sliding_window": False}
_GEMMA: Json = {
    "attention_bias": False,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
}
_OLMO_LAYER = _ATTENTION | _NORMS_OF_PROJECTIONS | _MLP | _POST_NORMS

FAMILIES = {
    "llama": Family(
        "llama",
        "LlamaForCausalLM",
        _DENSE,
        _BIASES,
        keys=_EXPERTS,  # whose values are 0
        interleaved=True,
        factors=True,
    ),
    "mixtral": Family(
        "llama",
        "MixtralForCausalLM",
        _ATTENTION | _PRE_NORMS | _experts("block_sparse_moe", "w1", "w3", "w2"),
        {"sliding_window": None},
        _mixtral,
        _EXPERTS,
        interleaved=True,
    ),
    "ministral3": Family(
        "mistral3",
        "Ministral3ForCausalLM",
        _DENSE,
        {"sliding_window": None},
        _ministral3,
        frozenset({"rope.scaling.yarn_log_multiplier", "attention.temperature_scale"}),
        interleaved=True,
    ),
    "phi3": Family(
        "phi3",
        "Phi3ForCausalLM",
        _PHI3 | _PRE_NORMS,
        {"attention_bias": False},
        _phi3,
        frozenset({"attention.sliding_window"}),
        factors=True,
        partial=True,
    ),
    "qwen2": Family(
        "qwen2", "Qwen2ForCausalLM", _DENSE | QKV_BIASES, {"use_sliding_window": False}
    ),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _DENSE | _NORMS_OF_HEADS, _QWEN3),
    "qwen3_moe": Family(
        "qwen3moe",
        "Qwen3MoeForCausalLM",
        _ATTENTION
        | _NORMS_OF_HEADS
        | _PRE_NORMS
        | _experts("mlp", "gate_proj", "up_proj", "down_proj"),
        # llama.cpp's code has it that the weights of a token's experts sum to one.
        _QWEN3 | {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        _qwen3_moe,
        _EXPERTS,
    ),
    "smollm3": Family(
        "smollm3",
        "SmolLM3ForCausalLM",
        _DENSE,
        # It is in llama.cpp's code which layers have no rotary embedding.
        _BIASES | {"no_rope_layer_interval": 4, "use_sliding_window": False},
        interleaved=True,
    ),
    "olmo2": Family("olmo2", "Olmo2ForCausalLM", _OLMO_LAYER, {"attention_bias": False}),
    "olmo3": Family(
        "olmo2",
        "Olmo3ForCausalLM",
        _OLMO_LAYER,
        {"attention_bias": False},
        _olmo3,
        _WINDOW | {"rope.freq_base_swa"},
    ),
    "exaone4": Family(
        "exaone4",
        "Exaone4ForCausalLM",
        _ATTENTION | _NORMS_OF_HEADS | _MLP | _POST_NORMS,
        own=_exaone4,
        keys=_WINDOW,
        factors=True,
    ),
    "granite": Family(
        "granite", "GraniteForCausalLM", _DENSE, _BIASES, _granite, _SCALES, interleaved=True
    ),
    "glm4": Family("glm4", "Glm4ForCausalLM", _GLM4, partial=True, biases=True),
    "gemma": Family("gemma", "GemmaForCausalLM", _DENSE, _GEMMA, offset=1.0),
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        _ATTENTION | _MLP | _FOUR_NORMS,
        _GEMMA,
        _gemma2,
        _WINDOW | _CAPS,
        offset=1.0,
    ),
    "gemma3_text": Family(
        "gemma3",
        "Gemma3ForCausalLM",
        _ATTENTION | _NORMS_OF_HEADS | _MLP | _FOUR_NORMS,
        _GEMMA | {"attn_logit_softcapping": None},
        _gemma3,
        _WINDOW | {"final_logit_softcapping", "rope.freq_base_swa"},
        offset=1.0,
    ),
}
"""The families by `model_type`. Two of llama.cpp's architectures are two families each."""


def model_type_of(fields: Fields) -> str:
    """The `model_type` of the model in a file.

    Raises:
      GGUFError: if its architecture is not supported.
    """
    name = fields.need("general.architecture", str)
    k = fields.under(name)
    if name == "llama" and k.get("expert_count", int):
        return "mixtral"
    if name == "olmo2" and k.get("attention.sliding_window", int):
        return "olmo3"
    for model_type, family in FAMILIES.items():
        if family.name == name:
            return model_type
    supported = dict.fromkeys(family.name for family in FAMILIES.values())
    raise GGUFError(
        f"{fields.path}: architecture {name!r} is not supported; supported are "
        f"{', '.join(supported)}. Get the model as a Hugging Face folder (safetensors) instead"
    )
