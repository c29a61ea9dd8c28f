"""Converts between Hugging Face `config.json` and `DecoderConfig`, for each model family.

`from_hf` and `to_hf` are inverse to each other. For each family, two functions side by side read
and write the keys that not all families share. `config_keys` handles unknown keys and bad values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selm_jax.models.config import (
    DecoderConfig,
    LayerKind,
    LongRope,
    Rope,
    ScalarHead,
    UnsupportedModel,
)
from selm_jax.models.config_keys import Json, Keys
from selm_jax.models.config_rope import magnitude_of, rope_from, rope_of, rope_to
from selm_jax.shell.json_file import JsonFileError, read_object

_CLASSIFIER = "ForSequenceClassification"
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}


# --- one family after the other: what is read, what is written ------------------------------------


def _llama_from(k: Keys, c: Json) -> Json:
    return _biases_from(k) | _all_alike(c, rope_from(k, 1e4))


def _llama_to(c: DecoderConfig) -> Json:
    return _biases_to(c) | rope_to(c.kinds[0].rope)


def _mistral_from(k: Keys, c: Json) -> Json:
    # Without the key, a Mistral config has transformers' default window, so it does have one.
    return _all_alike(c, rope_from(k, 1e4), k.size("sliding_window", 4096, null=True))


def _mistral_to(c: DecoderConfig) -> Json:
    return {"sliding_window": c.kinds[0].window} | rope_to(c.kinds[0].rope)


def _phi3_from(k: Keys, c: Json) -> Json:
    k.only("attention_bias", False, None)
    return _all_alike(c, rope_from(k, 1e4), k.size("sliding_window", None))


def _phi3_to(c: DecoderConfig) -> Json:
    rope = c.kinds[0].rope
    hf: Json = {"sliding_window": c.kinds[0].window} | rope_to(rope)
    if rope is not None and isinstance(rope.scaling, LongRope):
        original = rope.scaling.original
        # Earlier versions of transformers accept only these three keys under rope_scaling.
        if rope.scaling.magnitude == magnitude_of(c.max_positions / original, original):
            for key in ("original_max_position_embeddings", "attention_factor"):
                del hf["rope_scaling"][key]
        hf["original_max_position_embeddings"] = original
    return hf


def _qwen2_from(k: Keys, c: Json) -> Json:
    return {"qkv_bias": True} | _upper_windows(k, c, rope_from(k, 1e4))


def _qwen2_to(c: DecoderConfig) -> Json:
    return _switched_windows_to(c) | rope_to(c.kinds[0].rope)


def _qwen3_from(k: Keys, c: Json) -> Json:
    bias = k.flag("attention_bias")
    biases = {"qkv_bias": bias, "out_bias": bias}
    return {"qk_norm": True} | biases | _upper_windows(k, c, rope_from(k, 1e4))


def _qwen3_to(c: DecoderConfig) -> Json:
    return {"attention_bias": c.qkv_bias} | _switched_windows_to(c) | rope_to(c.kinds[0].rope)


def _smollm3_from(k: Keys, c: Json) -> Json:
    n = c["layers"]
    every = k.size("no_rope_layer_interval", 4)
    has_rope = k("no_rope_layers", None) or [(i + 1) % every != 0 for i in range(n)]
    if not isinstance(has_rope, list) or len(has_rope) != n or not set(map(str, has_rope)) <= _BITS:
        raise UnsupportedModel(
            f"config.json: no_rope_layers is {has_rope!r:.60}; expected a list of {n} zeros and "
            "ones"
        )
    rope = rope_from(k, 2e6)
    types = k.texts("layer_types")
    window = _window_if(k, None)
    k("max_window_layers", None)  # a key of Qwen in the published files; this family ignores it
    if types is None:  # transformers' rule: the layers without rope slide
        types = ["full_attention" if has_rope[i] else "sliding_attention" for i in range(n)]
    windows = _windows(types, window, n)
    kinds = tuple(LayerKind(rope if has_rope[i] else None, windows[i]) for i in range(n))
    return {"kinds": kinds} | _biases_from(k)


# How JSON marks layers with and without rotary embeddings.
_BITS = {"0", "1", "True", "False"}


def _smollm3_to(c: DecoderConfig) -> Json:
    rope = next(kind.rope for kind in c.kinds if kind.rope)
    return (
        {"no_rope_layers": [int(kind.rope is not None) for kind in c.kinds]}
        | _biases_to(c)
        | _switched_windows_to(c)
        | rope_to(rope)
    )


def _gemma_from(k: Keys, c: Json) -> Json:
    """The fields of `DecoderConfig` that Gemma 2 and 3 have in common."""
    k.only("attention_bias", False, None)
    k.only("use_bidirectional_attention", None, False)
    return {
        "post_norms": True,
        "norm_offset": 1.0,
        "embed_scale": c["embed"] ** 0.5,
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


def _gemma2_from(k: Keys, c: Json) -> Json:
    n = c["layers"]
    types = k.texts("layer_types") or _alternating(n, 2)
    window = k.size("sliding_window", 4096, null=True)
    k.only("sliding_window_size", window, None)  # the same once more, as 9B and 27B have it
    windows = _windows(types, window, n)
    rope = rope_from(k, 1e4)
    return _gemma_from(k, c) | {
        "kinds": tuple(LayerKind(rope, window) for window in windows),
        "attention_cap": k.number("attn_logit_softcapping", 50.0, null=True),
        "logit_cap": k.number("final_logit_softcapping", 30.0, null=True),
    }


def _gemma2_to(c: DecoderConfig) -> Json:
    return _gemma_to(c) | _layer_types_to(c) | rope_to(c.kinds[0].rope)


def _gemma3_from(k: Keys, c: Json) -> Json:
    n = c["layers"]
    said, kept = (k.size(f"{mark}sliding_window_pattern", None) for mark in ("", "_"))
    every = said or kept or 6
    types = k.texts("layer_types") or _alternating(n, every)
    window = k.size("sliding_window", 4096, null=True)
    nested = k.object("rope_parameters")
    scaling = nested.get("full_attention") or k.object("rope_scaling")
    full = rope_of(scaling, k.number("rope_theta", None) or 1e6, k)
    local = rope_of(
        nested.get("sliding_attention") or {}, k.number("rope_local_base_freq", None) or 1e4, k
    )
    ropes = {"full_attention": full, "sliding_attention": local}
    windows = _windows(types, window, n)
    return _gemma_from(k, c) | {
        "qk_norm": True,
        "kinds": tuple(LayerKind(ropes[types[i]], windows[i]) for i in range(n)),
        "attention_cap": k.number("attn_logit_softcapping", None),
        "logit_cap": k.number("final_logit_softcapping", None),
    }


def _gemma3_to(c: DecoderConfig) -> Json:
    hf = _gemma_to(c) | _layer_types_to(c)
    ropes = {kind.window is not None: kind.rope for kind in c.kinds}
    if (local := ropes.get(True)) is not None:
        hf["rope_local_base_freq"] = local.theta
    return hf | (rope_to(ropes[False]) if False in ropes else {})


@dataclasses.dataclass(frozen=True)
class Family:
    """A `model_type`: its class, its defaults, and functions that read and write its own keys."""

    architecture: str
    read: Callable[[Keys, Json], Json]
    write: Callable[[DecoderConfig], Json]
    tied: bool = False
    activation_key: str = "hidden_act"
    activation: str = "silu"
    head_dim: int | None = None  # transformers' default; None: hidden_size / num_attention_heads
    pad: int | None = None  # transformers' default of pad_token_id
    classifier: str = ""  # the class of reward models, if its name does not follow `architecture`

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
    """The `DecoderConfig` for the dictionary of a `config.json`.

    Raises:
      UnsupportedModel: if the family is unknown, a key is missing or not understood, or a known
        key has a value that the decoder cannot express. The message names the key.
    """
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise UnsupportedModel(
            f"config.json: model_type is {name!r}; this version supports {', '.join(FAMILIES)}"
        )
    family, k = FAMILIES[name], Keys(hf)
    heads, width = k.size("num_attention_heads"), k.size("hidden_size")
    activation = k(family.activation_key, family.activation)
    if family.activation_key != "hidden_act":  # Gemma has both; the other one decides
        k.only("hidden_act", activation, "gelu")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise UnsupportedModel(
            f"config.json: {family.activation_key} is {activation!r}; "
            f"the decoder supports {', '.join(_ACTIVATIONS)}"
        )
    common = {
        "vocab_size": k.size("vocab_size"),
        "embed": width,
        "heads": heads,
        "kv_heads": k.size("num_key_value_heads", None) or heads,
        "head_dim": k.size("head_dim", family.head_dim, null=True) or width // heads,
        "mlp": k.size("intermediate_size"),
        "norm_eps": k.number("rms_norm_eps"),
        "tied": k.flag("tie_word_embeddings", family.tied),
        "max_positions": k.size("max_position_embeddings"),
        "architecture": family.architecture,
        "activation": _ACTIVATIONS[activation],
        "head": _head_from(k, family),
    }
    own = family.read(k, common | {"layers": k.size("num_hidden_layers")})
    k.finish(name)
    return DecoderConfig(**(common | own))


def to_hf(config: DecoderConfig) -> Json:
    """The part of `config.json` that describes the model; `from_hf(to_hf(c)) == c`.

    It uses the keys that every version of transformers and vLLM reads (`rope_theta`,
    `rope_scaling`), not the keys that only transformers 5 reads.
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
    """The `config.json` of a reward model that is initialised from the model of config `hf`.

    Args:
      hf: the model's `config.json`.
      pad: `pad_token_id`, used if `hf` has none. If both are None, transformers scores only one
        text at a time and refuses batches.
    """
    family = FAMILIES[hf["model_type"]]
    given = hf.get("pad_token_id", family.pad)
    return {**hf, **_reward_model_to(family, pad if given is None else given)}


def read_config(folder: Path) -> DecoderConfig:
    """Reads the `DecoderConfig` of the model in a Hugging Face folder."""
    return _read(Path(folder) / "config.json", lambda hf: hf)


def read_as_reward_model(file: Path, pad: int | None) -> DecoderConfig:
    """The config of a reward model that is initialised from the model with config.json `file`.

    Args:
      file: the config.json.
      pad: see `reward_model_json`.
    """
    return _read(file, lambda hf: reward_model_json(hf, pad))


def _read(file: Path, change: Callable[[Json], Json]) -> DecoderConfig:
    try:
        return from_hf(change(read_object(file)))
    except UnsupportedModel as e:
        raise UnsupportedModel(f"{file.parent}: {e}") from e
    except JsonFileError as e:
        raise UnsupportedModel(str(e)) from e


# --- pieces that several families share -----------------------------------------------------------


def _head_from(k: Keys, family: Family) -> ScalarHead | None:
    """A reward model's head if `config.json` names a classifier; otherwise None."""
    names, pad = k.texts("architectures") or [], k("pad_token_id", family.pad)
    labels, count = k.object("id2label", None), k.size("num_labels", None)
    if not any(name.endswith(_CLASSIFIER) for name in names):
        return None
    found = len(labels) if labels is not None else 2 if count is None else count
    if found != 1:
        said = "id2label" if labels is not None else "num_labels"
        default = " (transformers' default without id2label and num_labels)"
        raise UnsupportedModel(
            f"config.json: {names[0]} has {found} labels according to {said}"
            f"{default * (labels is None and count is None)}; expected one label, the reward"
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


def _biases_from(k: Keys) -> Json:
    attention, mlp = k.flag("attention_bias"), k.flag("mlp_bias")
    return {"qkv_bias": attention, "out_bias": attention, "mlp_bias": mlp}


def _biases_to(c: DecoderConfig) -> Json:
    return {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias}


def _upper_windows(k: Keys, c: Json, rope: Rope) -> Json:
    """Qwen's rule: with `use_sliding_window`, layers from `max_window_layers` on have a window."""
    n, lower = c["layers"], k.count("max_window_layers", 28)
    window = _window_if(k, 4096)
    types = k.texts("layer_types") or [
        "full_attention" if i < lower else "sliding_attention" for i in range(n)
    ]
    return {"kinds": tuple(LayerKind(rope, w) for w in _windows(types, window, n))}


def _window_if(k: Keys, default: int | None) -> int | None:
    """The size of the window if `use_sliding_window` is true; otherwise None."""
    window = k.size("sliding_window", default, null=True)
    return window if k.flag("use_sliding_window") else None


def _alternating(layers: int, every: int) -> list[str]:
    """Layer types where one layer in `every` has full attention and the others a window."""
    kinds = "full_attention", "sliding_attention"
    return [kinds[(i + 1) % every != 0] for i in range(layers)]


def _windows(types: list[str], window: int | None, layers: int) -> list[int | None]:
    known = {"full_attention": None, "sliding_attention": window}
    if len(types) != layers or not set(types) <= set(known):
        raise UnsupportedModel(
            f"config.json: layer_types is {types!r:.200}; expected a list of {layers} "
            f"entries, each one of {', '.join(known)}"
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
