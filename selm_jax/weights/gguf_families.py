"""The table of llama.cpp's architectures: their tensors, and the names of their own keys.

llama.cpp keeps facts of some families in its code, so that they are not in the file. They are here
and in `gguf_keys`, which reads the keys, with a comment.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from selm_jax.weights import gguf_keys
from selm_jax.weights.gguf_file import Fields, GGUFError

Json = dict[str, Any]
Tensors = dict[str, tuple[str, ...]]

# The tensors of a layer: for each name in the file, the Hugging Face name and the shape, by the
# names of sizes (`gguf_model.sizes_of`). `{}` is the number of an expert, the tensor's first axis.
# Experts without a number are one tensor there, too, whose rows are the inputs; two tensors of the
# file that have the same name there alternate along its last axis.
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


_GPT_OSS: Tensors = {
    "attn_norm.weight": ("input_layernorm.weight", "hidden"),
    "post_attention_norm.weight": ("post_attention_layernorm.weight", "hidden"),
    "attn_output.bias": ("self_attn.o_proj.bias", "hidden"),
    "attn_sinks.weight": ("self_attn.sinks", "q_heads"),
    "ffn_gate_inp.weight": ("mlp.router.weight", "experts", "hidden"),
    "ffn_gate_inp.bias": ("mlp.router.bias", "experts"),
    "ffn_gate_exps.weight": ("mlp.experts.gate_up_proj", "experts", "one", "hidden"),
    "ffn_up_exps.weight": ("mlp.experts.gate_up_proj", "experts", "one", "hidden"),
    "ffn_gate_exps.bias": ("mlp.experts.gate_up_proj_bias", "experts", "one"),
    "ffn_up_exps.bias": ("mlp.experts.gate_up_proj_bias", "experts", "one"),
    "ffn_down_exps.weight": ("mlp.experts.down_proj", "experts", "hidden", "one"),
    "ffn_down_exps.bias": ("mlp.experts.down_proj_bias", "experts", "hidden"),
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
      heads: reads the heads if not all layers have the same; None if all have.
      keys_as_values: whether layers with full attention may have no values but their keys.
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
    heads: Callable[[Fields], gguf_keys.Heads] | None = None
    keys_as_values: bool = False


# --- the table ------------------------------------------------------------------------------------

_WINDOW = frozenset({"attention.sliding_window", "attention.sliding_window_pattern"})
_EXPERTS = frozenset({"expert_count", "expert_used_count", "expert_feed_forward_length"})
_DENSE = _ATTENTION | _MLP | _PRE_NORMS
_GEMMA4 = frozenset(
    {
        "attention.key_length_swa",
        "attention.value_length_swa",
        "attention.shared_kv_layers",
        "embedding_length_per_layer_input",
        "final_logit_softcapping",
        "rope.dimension_count_swa",
        "rope.freq_base_swa",
    }
)
_CAPS = frozenset({"attn_logit_softcapping", "final_logit_softcapping"})
_SCALES = frozenset({"attention.scale", "embedding_scale", "residual_scale", "logit_scale"})
# llama.cpp's converter writes them of a dense Granite 4, too, which has no such layers.
_OF_HYBRIDS = frozenset(
    {f"ssm.{k}" for k in ("conv_kernel", "group_count", "inner_size", "state_size")}
    | {"ssm.time_step_rank", "expert_count", "expert_used_count"}
    | {"expert_shared_feed_forward_length"}
)

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
        gguf_keys.mixtral,
        _EXPERTS,
        interleaved=True,
    ),
    "ministral3": Family(
        "mistral3",
        "Ministral3ForCausalLM",
        _DENSE,
        {"sliding_window": None},
        gguf_keys.ministral3,
        frozenset({"rope.scaling.yarn_log_multiplier", "attention.temperature_scale"}),
        interleaved=True,
    ),
    "phi3": Family(
        "phi3",
        "Phi3ForCausalLM",
        _PHI3 | _PRE_NORMS,
        {"attention_bias": False},
        gguf_keys.phi3,
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
        gguf_keys.qwen3_moe,
        _EXPERTS,
    ),
    "gpt_oss": Family(
        "gpt-oss",
        "GptOssForCausalLM",
        _ATTENTION | QKV_BIASES | _GPT_OSS,
        # The two numbers of the experts' activation are in llama.cpp's code.
        {"attention_bias": True, "swiglu_alpha": 1.702, "swiglu_limit": 7.0},
        gguf_keys.gpt_oss,
        _WINDOW | _EXPERTS,
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
        gguf_keys.olmo3,
        _WINDOW | {"rope.freq_base_swa"},
    ),
    "exaone4": Family(
        "exaone4",
        "Exaone4ForCausalLM",
        _ATTENTION | _NORMS_OF_HEADS | _MLP | _POST_NORMS,
        own=gguf_keys.exaone4,
        keys=_WINDOW,
        factors=True,
    ),
    "granite": Family(
        "granite",
        "GraniteForCausalLM",
        _DENSE,
        _BIASES,
        gguf_keys.granite,
        _SCALES | _OF_HYBRIDS,
        interleaved=True,
    ),
    "glm4": Family("glm4", "Glm4ForCausalLM", _GLM4, partial=True, biases=True),
    "gemma": Family("gemma", "GemmaForCausalLM", _DENSE, _GEMMA, offset=1.0),
    "gemma2": Family(
        "gemma2",
        "Gemma2ForCausalLM",
        _ATTENTION | _MLP | _FOUR_NORMS,
        _GEMMA,
        gguf_keys.gemma2,
        _WINDOW | _CAPS,
        offset=1.0,
    ),
    "gemma3_text": Family(
        "gemma3",
        "Gemma3ForCausalLM",
        _ATTENTION | _NORMS_OF_HEADS | _MLP | _FOUR_NORMS,
        _GEMMA | {"attn_logit_softcapping": None},
        gguf_keys.gemma3,
        _WINDOW | {"final_logit_softcapping", "rope.freq_base_swa"},
        offset=1.0,
    ),
    "gemma4_text": Family(
        "gemma4",
        "Gemma4ForCausalLM",
        _ATTENTION
        | _NORMS_OF_HEADS
        | _MLP
        | _FOUR_NORMS
        | {"layer_output_scale.weight": ("layer_scalar", "single")},
        _GEMMA,
        gguf_keys.gemma4,
        _WINDOW | _GEMMA4,
        factors=True,
        heads=gguf_keys.gemma4_heads,
        keys_as_values=True,
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
