"""Multi-modal models, of which only the text model is used: what their config.json has around it.

Their `text_config` is the config.json of a text model, a family of its own. It may leave out keys,
which then have the defaults of the multi-modal class. The other keys describe images, which no
prompt has here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from selm_jax.models.config import UnsupportedModel
from selm_jax.models.config_keys import Json, Keys


@dataclasses.dataclass(frozen=True)
class MultiModal:
    """A `model_type` whose model contains a text model.

    Attributes:
      texts: the model types that its text model may have, the first one if none is named, and for
        each the keys that `text_config` may leave out, with their values.
      unread: keys of `text_config` that the text model has alone; the multi-modal class ignores
        them in some programs, and not in others.
      images: the keys beside `text_config`, which matter to images and sound only.
    """

    texts: Mapping[str, Json]
    images: tuple[str, ...]
    unread: tuple[str, ...] = ()


MULTIMODAL = {
    "gemma3": MultiModal(
        texts={
            "gemma3_text": {
                "vocab_size": 262_208, "hidden_size": 2304, "intermediate_size": 9216,
                "num_hidden_layers": 26, "num_attention_heads": 8, "num_key_value_heads": 4,
                "head_dim": 256, "rms_norm_eps": 1e-6, "max_position_embeddings": 131_072,
            },
        },
        images=(
            "vision_config", "mm_tokens_per_image", "image_token_index", "image_token_id",
            "boi_token_index", "eoi_token_index",
        ),
        unread=("final_logit_softcapping",),
    ),
    "gemma4": MultiModal(
        texts={"gemma4_text": {}},
        images=(
            "vision_config", "audio_config", "vision_soft_tokens_per_image", "image_token_id",
            "video_token_id", "audio_token_id", "boi_token_id", "eoi_token_id", "boa_token_id",
            "eoa_token_id", "eoa_token_index",
        ),
    ),
    "mistral3": MultiModal(
        texts={"mistral": {}, "ministral3": {}},
        images=(
            "vision_config", "image_token_index", "image_token_id", "projector_hidden_act",
            "vision_feature_layer", "multimodal_projector_bias", "spatial_merge_size",
        ),
    ),
}  # fmt: skip

# Keys that stand beside `text_config` and are meant for the text model, too.
_SHARED = (
    "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "transformers_version",
)  # fmt: skip


def is_multimodal(hf: Mapping[str, Any]) -> bool:
    """Says whether a `config.json` is that of a multi-modal model whose text model can be used."""
    name = hf.get("model_type")
    return isinstance(name, str) and name in MULTIMODAL


def text_part(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The `config.json` of the text model in a multi-modal one; any other file as it is.

    Raises:
      UnsupportedModel: if the multi-modal model has another text model, or a key that is unknown.
    """
    if not is_multimodal(hf):
        return hf
    name = hf["model_type"]
    kind, k = MULTIMODAL[name], Keys(hf)
    inner = k.object("text_config")
    text = inner.get("model_type", next(iter(kind.texts)))
    if not isinstance(text, str) or text not in kind.texts:
        raise UnsupportedModel(
            f"config.json: the text_config of a {name} model has model_type {text!r:.60}; expected "
            f"{' or '.join(kind.texts)}. Use another model"
        )
    if any("ForCausalLM" not in each and "Conditional" not in each
           for each in k.texts("architectures") or ()):  # fmt: skip
        raise UnsupportedModel(
            f"config.json: architectures is {hf['architectures']!r:.100}; of {name} models only "
            "language models can be used. A reward model has to be one of text alone"
        )
    for key in kind.images:
        k(key, None)
    if odd := [key for key in kind.unread if inner.get(key) is not None]:
        raise UnsupportedModel(
            f"config.json: text_config of a {name} model has {odd[0]} {inner[odd[0]]!r:.60}, which "
            "transformers ignores there, and other programs do not. Remove it, or use another model"
        )
    shared = {key: hf[key] for key in _SHARED if key in hf}
    if k("tie_word_embeddings", None) is not None:  # transformers goes by this one
        inner = inner | {"tie_word_embeddings": hf["tie_word_embeddings"]}
    k.finish(name)
    own = {key: value for key, value in inner.items() if key != "architectures"}
    return {**kind.texts[text], **shared, **own, "model_type": text}
