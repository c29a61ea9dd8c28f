"""Model families as facts: Hugging Face `config.json` <-> `DecoderConfig`, both ways.

`from_hf` and `to_hf` are inverse to each other: each family says, side by side, what it reads and
what it writes beyond what all families share. A key of `config.json` that its family does not read
and that is not known to be harmless is an error, because a key that nobody reads is how
log-probabilities become silently wrong.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selm_jax.models.config import (
    DecoderConfig,
    LayerKind,
    Linear,
    Llama3,
    LongRope,
    Rope,
    ScalarHead,
    UnsupportedModel,
)

Json = dict[str, Any]

# Keys that say nothing about the function that the model computes.
_HARMLESS = {
    "_name_or_path", "auto_map", "bos_token_id", "eos_token_id", "dtype", "torch_dtype", "initializer_range", "transformers_version", "use_cache",
    "is_llama_config", "transformers.js_config", "unsloth_fixed", "unsloth_version",
    "_attn_implementation", "output_attentions", "output_hidden_states",
    "return_dict", "chunk_size_feed_forward", "label2id", "problem_type",
    "is_encoder_decoder", "cache_implementation", "model_type",
    # Of a language model; what they say of a reward model, `_head_from` reads.
    "architectures", "pad_token_id", "id2label", "num_labels",
    # Dropout of training runs; there is none here.
    "attention_dropout", "resid_pdrop", "embd_pdrop",
}  # fmt: skip

_CLASSIFIER = "ForSequenceClassification"
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}


class _Keys:
    """A `config.json` that remembers which of its keys were read."""

    def __init__(self, hf: Mapping[str, Any]):
        self._hf, self._read = hf, set()

    def __call__(self, key: str, default: Any = ...) -> Any:
        self._read.add(key)
        if default is ... and key not in self._hf:
            raise UnsupportedModel(f"config.json: key {key!r} is missing")
        return self._hf.get(key, default)

    def only(self, key: str, *allowed: Any) -> None:
        """The key, if it is there, must have a value under which it changes nothing."""
        value = self(key, allowed[0])
        if value not in allowed:
            raise UnsupportedModel(
                f"config.json: {key} is {value!r}; the decoder supports only {allowed[0]!r}"
            )

    def finish(self, family: str) -> None:
        self.only("quantization_config", None)
        if unknown := set(self._hf) - self._read - _HARMLESS:
            raise UnsupportedModel(
                f"config.json: {', '.join(sorted(unknown))}: not read for a {family} model and not "
                "known to be harmless. If it does not change the forward pass, add it to _HARMLESS "
                "in selm_jax/models/families.py"
            )


# --- one family after the other: what is read, what is written ------------------------------------


def _llama_from(k: _Keys, c: Json) -> Json:
    k.only("pretraining_tp", 1, None)
    k.only("rope_interleaved", False)
    return _biases_from(k) | _all_alike(c, _rope_from(k, 1e4))


def _llama_to(c: DecoderConfig) -> Json:
    return _biases_to(c) | _rope_to(c.kinds[0].rope)


def _mistral_from(k: _Keys, c: Json) -> Json:
    # A Mistral config without the key has transformers' default window, not none.
    return _all_alike(c, _rope_from(k, 1e4), k("sliding_window", 4096))


def _mistral_to(c: DecoderConfig) -> Json:
    return {"sliding_window": c.kinds[0].window} | _rope_to(c.kinds[0].rope)


def _phi3_from(k: _Keys, c: Json) -> Json:
    k.only("attention_bias", False, None)
    k.only("partial_rotary_factor", 1.0)
    return _all_alike(c, _rope_from(k, 1e4), k("sliding_window", None))


def _phi3_to(c: DecoderConfig) -> Json:
    rope = c.kinds[0].rope
    hf: Json = {"sliding_window": c.kinds[0].window} | _rope_to(rope)
    if rope is not None and isinstance(rope.scaling, LongRope):
        original = rope.scaling.original
        # Earlier versions of transformers take these three keys under rope_scaling and no more.
        if rope.scaling.magnitude == _magnitude(c.max_positions / original, original):
            for key in ("original_max_position_embeddings", "attention_factor"):
                del hf["rope_scaling"][key]
        hf["original_max_position_embeddings"] = original
    return hf


def _qwen2_from(k: _Keys, c: Json) -> Json:
    return {"qkv_bias": True} | _upper_windows(k, c, _rope_from(k, 1e4))


def _qwen2_to(c: DecoderConfig) -> Json:
    return _switched_windows_to(c) | _rope_to(c.kinds[0].rope)


def _qwen3_from(k: _Keys, c: Json) -> Json:
    bias = bool(k("attention_bias", False))
    biases = {"qkv_bias": bias, "out_bias": bias}
    return {"qk_norm": True} | biases | _upper_windows(k, c, _rope_from(k, 1e4))


def _qwen3_to(c: DecoderConfig) -> Json:
    return {"attention_bias": c.qkv_bias} | _switched_windows_to(c) | _rope_to(c.kinds[0].rope)


def _smollm3_from(k: _Keys, c: Json) -> Json:
    n = c["layers"]
    every = k("no_rope_layer_interval", 4)
    has_rope = k("no_rope_layers", None) or [(i + 1) % every != 0 for i in range(n)]
    rope = _rope_from(k, 2e6)
    types = k("layer_types", None)
    slides, window = k("use_sliding_window", False), k("sliding_window", None)
    window = window if slides else None
    if types is None:  # transformers' rule: the layers without rope slide
        types = ["full_attention" if has_rope[i] else "sliding_attention" for i in range(n)]
    windows = _windows(types, window, n)
    kinds = tuple(LayerKind(rope if has_rope[i] else None, windows[i]) for i in range(n))
    return {"kinds": kinds} | _biases_from(k)


def _smollm3_to(c: DecoderConfig) -> Json:
    rope = next(kind.rope for kind in c.kinds if kind.rope)
    return (
        {"no_rope_layers": [int(kind.rope is not None) for kind in c.kinds]}
        | _biases_to(c)
        | _switched_windows_to(c)
        | _rope_to(rope)
    )


def _gemma_from(k: _Keys, c: Json) -> Json:
    """What Gemma 2 and 3 share."""
    k.only("attention_bias", False, None)
    k.only("use_bidirectional_attention", None, False)
    return {
        "post_norms": True,
        "norm_offset": 1.0,
        "embed_scale": c["embed"] ** 0.5,
        "query_scale": k("query_pre_attn_scalar", 256) ** -0.5,
    }


def _gemma_to(c: DecoderConfig) -> Json:
    assert c.query_scale is not None
    scalar = c.query_scale**-2
    return {
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 else scalar,
        "attn_logit_softcapping": c.attention_cap,
        "final_logit_softcapping": c.logit_cap,
    }


def _gemma2_from(k: _Keys, c: Json) -> Json:
    n = c["layers"]
    types = k("layer_types", None) or _alternating(n, 2)
    windows = _windows(types, k("sliding_window", 4096), n)
    rope = _rope_from(k, 1e4)
    return _gemma_from(k, c) | {
        "kinds": tuple(LayerKind(rope, window) for window in windows),
        "attention_cap": k("attn_logit_softcapping", 50.0),
        "logit_cap": k("final_logit_softcapping", 30.0),
    }


def _gemma2_to(c: DecoderConfig) -> Json:
    return _gemma_to(c) | _layer_types_to(c) | _rope_to(c.kinds[0].rope)


def _gemma3_from(k: _Keys, c: Json) -> Json:
    n = c["layers"]
    every = k("sliding_window_pattern", None) or k("_sliding_window_pattern", None) or 6
    types = k("layer_types", None) or _alternating(n, every)
    window = k("sliding_window", 4096)
    nested = k("rope_parameters", None) or {}
    full = _rope_of(
        nested.get("full_attention") or k("rope_scaling", None) or {}, k("rope_theta", 1e6), k
    )
    local = _rope_of(nested.get("sliding_attention") or {}, k("rope_local_base_freq", 1e4), k)
    ropes = {"full_attention": full, "sliding_attention": local}
    windows = _windows(types, window, n)
    return _gemma_from(k, c) | {
        "qk_norm": True,
        "kinds": tuple(LayerKind(ropes[types[i]], windows[i]) for i in range(n)),
        "attention_cap": k("attn_logit_softcapping", None),
        "logit_cap": k("final_logit_softcapping", None),
    }


def _gemma3_to(c: DecoderConfig) -> Json:
    hf = _gemma_to(c) | _layer_types_to(c)
    ropes = {kind.window is not None: kind.rope for kind in c.kinds}
    if (local := ropes.get(True)) is not None:
        hf["rope_local_base_freq"] = local.theta
    return hf | (_rope_to(ropes[False]) if False in ropes else {})


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type`: its class, its defaults, and how its own facts are read and written."""

    architecture: str
    read: Callable[[_Keys, Json], Json]
    write: Callable[[DecoderConfig], Json]
    tied: bool = False
    activation_key: str = "hidden_act"
    activation: str = "silu"
    head_dim: int | None = None  # transformers' default; None: hidden_size / num_attention_heads
    pad: int | None = None  # transformers' default of pad_token_id
    classifier: str = ""  # the class of reward models, where it is not named like `architecture`

    @property
    def reward_model(self) -> str:
        return self.classifier or self.architecture.replace("ForCausalLM", _CLASSIFIER)


_GEMMA: Json = {
    "tied": True,
    "activation_key": "hidden_activation",
    "activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "pad": 0,
}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama_from, _llama_to),
    "mistral": Family("MistralForCausalLM", _mistral_from, _mistral_to),
    "phi3": Family("Phi3ForCausalLM", _phi3_from, _phi3_to, pad=32000),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2_from, _qwen2_to),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3_from, _qwen3_to, head_dim=128),
    "smollm3": Family("SmolLM3ForCausalLM", _smollm3_from, _smollm3_to, tied=True, pad=128004),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2_from, _gemma2_to, **_GEMMA),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _gemma3_from,
        _gemma3_to,
        **_GEMMA,
        classifier=f"Gemma3Text{_CLASSIFIER}",
    ),
}


# --- both ways ------------------------------------------------------------------------------------


def from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """The decoder's facts from the dictionary of a `config.json`.

    Raises:
      UnsupportedModel: an unknown family, a key that is missing or that nobody here understands, or
        a known key with a value that the decoder cannot express. The message names the key.
    """
    name = hf.get("model_type")
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"config.json: model_type is {name!r}; this version knows {', '.join(FAMILIES)}"
        )
    family, k = FAMILIES[name], _Keys(hf)
    heads, width = k("num_attention_heads"), k("hidden_size")
    activation = k(family.activation_key, family.activation)
    if family.activation_key != "hidden_act":  # Gemma has both; the other one decides
        k.only("hidden_act", activation, "gelu")
    if activation not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"config.json: {family.activation_key} is {activation!r}; "
            f"the decoder knows {', '.join(_ACTIVATIONS)}"
        )
    common = {
        "vocab_size": k("vocab_size"),
        "embed": width,
        "heads": heads,
        "kv_heads": k("num_key_value_heads", None) or heads,
        "head_dim": k("head_dim", family.head_dim) or width // heads,
        "mlp": k("intermediate_size"),
        "norm_eps": k("rms_norm_eps"),
        "tied": k("tie_word_embeddings", family.tied),
        "max_positions": k("max_position_embeddings"),
        "architecture": family.architecture,
        "activation": _ACTIVATIONS[activation],
        "head": _head_from(k, family),
    }
    own = family.read(k, common | {"layers": k("num_hidden_layers")})
    k.finish(name)
    return DecoderConfig(**(common | own))


def to_hf(config: DecoderConfig) -> Json:
    """The part of `config.json` that describes the model; `from_hf(to_hf(c)) == c`.

    Written with the keys that every version of transformers and vLLM reads (`rope_theta`,
    `rope_scaling`), not with those of transformers 5 alone.
    """
    name, family = next(
        (n, f) for n, f in FAMILIES.items() if f.architecture == config.architecture
    )
    activation = next(k for k, v in _ACTIVATIONS.items() if v == config.activation)
    if config.head is None:
        classes: Json = {"architectures": [config.architecture]}
    else:
        classes = _reward_model_to(family, config.head.pad)
    return {
        **classes,
        "model_type": name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.embed,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.mlp,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_positions,
        family.activation_key: activation,
    } | family.write(config)


def reward_model_json(hf: Mapping[str, Any], pad: int | None) -> Json:
    """The `config.json` of a reward model that begins from the model of this one.

    Args:
      pad: `pad_token_id`, if `hf` does not say it. Without any, transformers scores one text at a
        time and refuses batches.
    """
    family = FAMILIES[hf["model_type"]]
    given = hf.get("pad_token_id", family.pad)
    return {**hf, **_reward_model_to(family, pad if given is None else given)}


def read_config(folder: Path) -> DecoderConfig:
    """The facts of the model in a Hugging Face folder."""
    return _read(folder, lambda hf: hf)


def read_as_reward_model(folder: Path, pad: int | None) -> DecoderConfig:
    """The same of the reward model that begins from it; `pad` as in `reward_model_json`."""
    return _read(folder, lambda hf: reward_model_json(hf, pad))


def _read(folder: Path, change: Callable[[Json], Json]) -> DecoderConfig:
    file = Path(folder) / "config.json"
    try:
        return from_hf(change(json.loads(file.read_text())))
    except UnsupportedModel as e:
        raise UnsupportedModel(f"{folder}: {e}") from e
    except ValueError as e:
        raise UnsupportedModel(f"{file}: not JSON: {e}") from e


# --- pieces that several families share -----------------------------------------------------------


def _head_from(k: _Keys, family: Family) -> ScalarHead | None:
    """A reward model's head, by the class that `config.json` names."""
    names, pad = k("architectures", None) or [], k("pad_token_id", family.pad)
    labels, count = k("id2label", None), k("num_labels", None)
    if not any(name.endswith(_CLASSIFIER) for name in names):
        return None
    found = len(labels) if labels is not None else 2 if count is None else count
    if found != 1:
        said = "id2label" if labels is not None else "num_labels"
        default = " (transformers' default, where neither id2label nor num_labels is there)"
        raise UnsupportedModel(
            f"config.json: {names[0]} with {found} labels by {said}"
            f"{default * (labels is None and count is None)}; a reward model has one, its score"
        )
    return ScalarHead(pad)


def _reward_model_to(family: Family, pad: int | None) -> Json:
    return {
        "architectures": [family.reward_model],
        "id2label": {"0": "LABEL_0"},
        "label2id": {"LABEL_0": 0},
        "pad_token_id": pad,
    }


def _all_alike(c: Json, rope: Rope, window: int | None = None) -> Json:
    return {"kinds": (LayerKind(rope, window),) * c["layers"]}


def _biases_from(k: _Keys) -> Json:
    attention = bool(k("attention_bias", False))
    mlp = bool(k("mlp_bias", False))
    return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": mlp}


def _biases_to(c: DecoderConfig) -> Json:
    return {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


def _upper_windows(k: _Keys, c: Json, rope: Rope) -> Json:
    """Qwen's rule: with `use_sliding_window` the layers from `max_window_layers` on slide."""
    n, lower = c["layers"], k("max_window_layers", 28)
    slides, window = k("use_sliding_window", False), k("sliding_window", 4096)
    window = window if slides else None
    types = k("layer_types", None) or [
        "full_attention" if i < lower else "sliding_attention" for i in range(n)
    ]
    return {"kinds": tuple(LayerKind(rope, w) for w in _windows(types, window, n))}


def _alternating(layers: int, every: int) -> list[str]:
    """Every so many layers one sees all."""
    kinds = "full_attention", "sliding_attention"
    return [kinds[(i + 1) % every != 0] for i in range(layers)]


def _windows(types: list[str], window: int | None, layers: int) -> list[int | None]:
    known = {"full_attention": None, "sliding_attention": window}
    if len(types) != layers or not set(types) <= set(known):
        raise UnsupportedModel(
            f"config.json: layer_types is {types}; expected {layers} of {', '.join(known)}"
        )
    return [known[t] for t in types]


def _layer_types_to(c: DecoderConfig) -> Json:
    windows = [kind.window for kind in c.kinds if kind.window is not None]
    return {
        "layer_types": [
            "full_attention" if kind.window is None else "sliding_attention" for kind in c.kinds
        ],
        "sliding_window": windows[0] if windows else None,
    }


def _switched_windows_to(c: DecoderConfig) -> Json:
    hf = _layer_types_to(c)
    return hf | {"use_sliding_window": hf["sliding_window"] is not None}


def _rope_from(k: _Keys, theta: float) -> Rope:
    """transformers 5 keeps everything under `rope_parameters`, earlier versions the base at the top
    level and the rest under `rope_scaling`."""
    new, old = k("rope_parameters", None), k("rope_scaling", None)
    if new and old and new != old:
        raise UnsupportedModel(f"config.json: rope_parameters {new!r} but rope_scaling {old!r}")
    return _rope_of(new or old or {}, k("rope_theta", theta), k)


def _rope_of(parameters: Mapping[str, Any], theta: float, k: _Keys) -> Rope:
    p = dict(parameters)
    kinds = {p.pop(key) for key in ("rope_type", "type") if key in p}
    inner = float(p.pop("rope_theta", theta))
    # Where only one place names the base, the other one's default says nothing.
    if k("rope_theta", None) is not None and "rope_theta" in parameters and inner != theta:
        raise UnsupportedModel(f"config.json: rope_theta {theta} but rope_parameters says {inner}")
    if p.pop("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModel("config.json: partial_rotary_factor is not 1")
    original = k("original_max_position_embeddings", None)
    try:
        match sorted(kinds) or ["default"]:
            case ["default"]:
                scaling = None
                p.pop("original_max_position_embeddings", None)
            case ["linear"]:
                scaling = Linear(float(p.pop("factor")))
            case ["llama3"]:
                scaling = Llama3(
                    float(p.pop("factor")),
                    float(p.pop("low_freq_factor")),
                    float(p.pop("high_freq_factor")),
                    int(p.pop("original_max_position_embeddings")),
                )
            case ["longrope"] | ["su"]:
                inside = p.pop("original_max_position_embeddings", original)
                if original not in (None, inside):
                    raise UnsupportedModel(
                        f"config.json: original_max_position_embeddings {original} but rope "
                        f"scaling says {inside}"
                    )
                scaling = _longrope(p, inside or k("max_position_embeddings"), k)
            case found:
                raise UnsupportedModel(f"config.json: rope of type {', '.join(found)} is unknown")
    except KeyError as missing:
        raise UnsupportedModel(
            f"config.json: rope scaling {parameters!r} has no {missing}"
        ) from None
    if p:
        raise UnsupportedModel(
            f"config.json: rope parameters {', '.join(sorted(p))} are not known for "
            f"{''.join(kinds) or 'default'!r}: {parameters!r}"
        )
    return Rope(inner, scaling)


def _longrope(p: Json, original: int, k: _Keys) -> LongRope:
    factor = p.pop("factor", None) or k("max_position_embeddings") / original
    magnitude = p.pop("attention_factor", None)
    short, long = p.pop("short_factor"), p.pop("long_factor")
    return LongRope(
        tuple(map(float, short)),
        tuple(map(float, long)),
        original,
        _magnitude(factor, original) if magnitude is None else magnitude,
    )


def _magnitude(factor: float, original: int) -> float:
    """LongRoPE's, for a context extended by `factor` (arXiv 2402.13753; Phi-3's default)."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _rope_to(rope: Rope | None) -> Json:
    assert rope is not None  # of the families, SmolLM3 alone has layers without
    match rope.scaling:
        case None:
            scaling = None
        case Linear(factor):
            scaling = {"rope_type": "linear", "factor": factor}
        case Llama3(factor, low, high, original):
            scaling = {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": original,
            }
        case LongRope(short, long, original, magnitude):
            scaling = {
                "rope_type": "longrope",
                "short_factor": list(short),
                "long_factor": list(long),
                "original_max_position_embeddings": original,
                "attention_factor": magnitude,
            }
    return {"rope_theta": rope.theta, "rope_scaling": scaling}
