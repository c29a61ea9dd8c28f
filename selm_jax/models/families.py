"""Converts between Hugging Face `config.json` and `DecoderConfig`, for each model family.

`from_hf` and `to_hf` are inverse to each other. `FAMILIES` is the table of families: what each one
reads and writes in its own way is in `family_llama`, `family_granite`, `family_mixtures` and
`family_gemma`. `config_keys` handles unknown keys and bad values. Of a multi-modal model, the text
model is read.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selm_jax.models import family_gemma as gemma
from selm_jax.models import family_granite as granite
from selm_jax.models import family_llama as llama
from selm_jax.models import family_mixtures as moe
from selm_jax.models.config import DecoderConfig, ScalarHead, UnsupportedModel
from selm_jax.models.config_keys import Json, Keys
from selm_jax.models.multimodal import MULTIMODAL, text_part
from selm_jax.shell.json_file import JsonFileError, read_object

_CLASSIFIER = "ForSequenceClassification"
_ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}


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
    activations: Mapping[str, str] = dataclasses.field(default_factory=lambda: _ACTIVATIONS)
    classifier: str = ""  # the class of reward models, if its name does not follow `architecture`
    has_classifier: bool = True  # whether transformers has such a class

    @property
    def reward_model(self) -> str:
        if not self.has_classifier:
            raise UnsupportedModel(
                f"transformers has no class of reward models for {self.architecture}, so that "
                "nothing else could load one. Start the reward model from another model"
            )
        return self.classifier or self.architecture.replace("ForCausalLM", _CLASSIFIER)


_GEMMA: Json = {
    "tied": True,
    "activation_key": "hidden_activation",
    "activation": "gelu_pytorch_tanh",
    "head_dim": 256,
    "pad": 0,
}
_GEMMA_1: Json = _GEMMA | {"activation_key": "hidden_act"}
FAMILIES = {
    "llama": Family("LlamaForCausalLM", llama.llama_from, llama.llama_to),
    "mistral": Family("MistralForCausalLM", llama.mistral_from, llama.mistral_to),
    "ministral3": Family(
        "Ministral3ForCausalLM", llama.ministral3_from, llama.ministral3_to, head_dim=128, pad=11
    ),
    "phi3": Family("Phi3ForCausalLM", llama.phi3_from, llama.phi3_to, pad=32000),
    "qwen2": Family("Qwen2ForCausalLM", llama.qwen2_from, llama.qwen2_to),
    "qwen3": Family("Qwen3ForCausalLM", llama.qwen3_from, llama.qwen3_to, head_dim=128),
    "smollm3": Family(
        "SmolLM3ForCausalLM", llama.smollm3_from, llama.smollm3_to, tied=True, pad=128004
    ),
    "olmo2": Family("Olmo2ForCausalLM", llama.olmo2_from, llama.olmo2_to, pad=1),
    "olmo3": Family("Olmo3ForCausalLM", llama.olmo3_from, llama.olmo3_to, pad=1),
    "exaone4": Family("Exaone4ForCausalLM", llama.exaone4_from, llama.exaone4_to),
    "glm4": Family("Glm4ForCausalLM", llama.glm4_from, llama.glm4_to, head_dim=128, pad=151329),
    "granite": Family(
        "GraniteForCausalLM", granite.granite_from, granite.granite_to, has_classifier=False
    ),
    "granitemoehybrid": Family(
        "GraniteMoeHybridForCausalLM",
        granite.granite4_from,
        granite.granite4_to,
        has_classifier=False,
    ),
    "mixtral": Family("MixtralForCausalLM", moe.mixtral_from, moe.mixtral_to),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", moe.qwen3_moe_from, moe.qwen3_moe_to),
    "gpt_oss": Family(
        "GptOssForCausalLM",
        moe.gpt_oss_from,
        moe.gpt_oss_to,
        head_dim=64,
        activations={"silu": "silu"},  # nothing reads it, because the experts have their own
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        gemma.gemma_from,
        gemma.gemma_to,
        **_GEMMA_1,
        # "gelu" in the published files means the tanh form, as transformers says, too.
        activations=_ACTIVATIONS | {"gelu": "gelu_tanh"},
    ),
    "gemma2": Family("Gemma2ForCausalLM", gemma.gemma2_from, gemma.gemma2_to, **_GEMMA),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        gemma.gemma3_from,
        gemma.gemma3_to,
        **_GEMMA,
        classifier=f"Gemma3Text{_CLASSIFIER}",
    ),
    "gemma4_text": Family(
        "Gemma4ForCausalLM", gemma.gemma4_from, gemma.gemma4_to, **_GEMMA, has_classifier=False
    ),
}

# What differs in models that a reader may take for a supported one.
_CLOSE = {
    "qwen2_moe": "qwen3_moe, but every token also has an expert that is shared by all",
    "qwen3_next": "qwen3_moe, but most layers have linear attention, and an expert is shared",
    "qwen3_5": "qwen3, but most layers have linear attention, and it also reads images",
    "qwen3_5_moe": "qwen3_moe, but most layers have linear attention, and an expert is shared",
    "llama4": "llama, but it has experts, one of them shared, and it also reads images",
    "mistral4": "mistral, but it has experts, and its attention is compressed",
    "ministral": "mistral, but its layers differ in their windows",
    "granitemoeshared": "granite, but with experts beside an MLP that all tokens use",
    "olmoe": "qwen3_moe, but queries and keys are normed over all heads together",
    "phimoe": "mixtral, but its router chooses experts one after the other, and norms have biases",
    "granitemoe": "granite, but a mixture of experts",
    "deepseek_v3": "qwen3_moe, but its attention is compressed, and an expert is shared",
    "glm4_moe": "qwen3_moe, but an expert is shared, and the router has a bias",
    "olmo": "olmo2, but its norms have no scales and its queries, keys and values are clipped",
    "phi": "phi3, but its attention and MLP are parallel and its norms subtract the mean",
    "phi4mm": "phi3, but it also reads images and sound",
    "gemma3n": "gemma3_text, but its layers share parts and have embeddings of their own",
    "gemma4_unified": "gemma4_text, but it also reads images and sound, without a tower of its own",
    "qwen2_5_vl": "qwen2, but it also reads images",
    "qwen3_vl": "qwen3, but it also reads images",
    "glm": "glm4, but without norms behind the blocks",
    "chatglm": "glm4, but it needs code of its own; use a model of the 0414 series",
}


# --- both ways ------------------------------------------------------------------------------------


def from_hf(hf: Mapping[str, Any]) -> DecoderConfig:
    """The `DecoderConfig` for the dictionary of a `config.json`.

    Raises:
      UnsupportedModel: if the family is unknown, a key is missing or not understood, or a known
        key has a value that the decoder cannot express. The message names the key.
    """
    hf = text_part(hf)
    name = hf.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        close = _CLOSE.get(name) if isinstance(name, str) else None
        raise UnsupportedModel(
            f"config.json: model_type is {name!r:.60}; this version supports "
            f"{', '.join(FAMILIES)}, and the text models in {', '.join(MULTIMODAL)}"
            f"{f'. It is close to {close}' if close else ''}"
        )
    family, k = FAMILIES[name], Keys(hf)
    heads, width = k.size("num_attention_heads"), k.size("hidden_size")
    activation = k(family.activation_key, family.activation)
    if family.activation_key != "hidden_act":  # Gemma has both; the other one decides
        k.only("hidden_act", activation, "gelu")
    if not isinstance(activation, str) or activation not in family.activations:
        raise UnsupportedModel(
            f"config.json: {family.activation_key} is {activation!r}; "
            f"the decoder supports {', '.join(family.activations)}"
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
        "activation": family.activations[activation],
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
    activation = next(k for k, v in family.activations.items() if v == config.activation)
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
      hf: the model's `config.json`. Of a multi-modal model, only the text model is used.
      pad: `pad_token_id`, used if `hf` has none. If both are None, transformers scores only one
        text at a time and refuses batches.
    """
    hf = text_part(hf)
    family = FAMILIES[hf["model_type"]]
    given = hf.get("pad_token_id", family.pad)
    return {**hf, **_reward_model_to(family, pad if given is None else given)}


def text_model_json(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `config.json` of the text model alone; any but a multi-modal one stays as it is."""
    text = text_part(hf)
    if text is hf:
        return hf
    return {"architectures": [FAMILIES[text["model_type"]].architecture], **text}


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


def _head_from(k: Keys, family: Family) -> ScalarHead | None:
    """A reward model's head if `config.json` names a classifier; otherwise None."""
    names, pad = k.texts("architectures") or [], k("pad_token_id", family.pad)
    labels, count = k.object("id2label", None), k.size("num_labels", None)
    if not any(name.endswith(_CLASSIFIER) for name in names):
        return None
    found = len(labels) if labels is not None else 2 if count is None else count
    if family.reward_model and found != 1:
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
