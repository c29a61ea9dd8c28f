"""`DebertaConfig`, the hyperparameters of a DeBERTa-v3, read from its `config.json`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from selm_jax.models.config import UnsupportedModel
from selm_jax.models.config_keys import is_off, number, size


@dataclasses.dataclass(frozen=True)
class DebertaConfig:
    """The encoder's hyperparameters. Hashable, so that it can be a static argument of jit.

    Attributes:
      vocab_size: rows of the embedding.
      embed: width of the residual stream.
      layers, heads: `heads` divides `embed`.
      mlp: width of the MLP.
      norm_eps: epsilon inside the layer norms.
      buckets: distance buckets on each side; distances below half of this number are exact.
      max_distance: all distances from this one upwards share the last bucket.
    """

    vocab_size: int
    embed: int
    layers: int
    heads: int
    mlp: int
    norm_eps: float
    buckets: int
    max_distance: int

    def __post_init__(self):
        if self.embed % self.heads:
            raise UnsupportedModel(
                f"hidden_size {self.embed} is not divisible by {self.heads} attention heads; "
                "expected a multiple"
            )
        if self.buckets < 4 or self.buckets % 2 or self.max_distance < self.buckets:
            raise UnsupportedModel(
                f"position_buckets is {self.buckets} and the largest distance {self.max_distance}; "
                "expected an even number of at least 4, and a distance of at least that number"
            )

    @property
    def head_dim(self) -> int:
        return self.embed // self.heads


# The values that `models/deberta.py` supports. Every key must be present, because a missing key has
# transformers' default, which for several keys is a different value.
_REQUIRED: Mapping[str, tuple[Any, ...]] = {
    "model_type": ("deberta-v2",),
    "hidden_act": ("gelu",),
    "relative_attention": (True,),
    "position_biased_input": (False,),
    "share_att_key": (True,),
    "norm_rel_ebd": ("layer_norm",),
    "type_vocab_size": (0,),
}
# Keys that may only have the value with which they change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "conv_kernel_size": (0, None),
    "is_decoder": (False,),
    "add_cross_attention": (False,),
    "quantization_config": (None,),
}
_USED = {
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "layer_norm_eps", "position_buckets", "max_position_embeddings", "max_relative_positions",
    "pos_att_type", "attention_head_size", "embedding_size",
}  # fmt: skip
_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
    "position_buckets", "max_position_embeddings",
)  # fmt: skip
# Keys without effect on the hidden states: for training, unused pooling and heads, and labels.
_HARMLESS = {
    "_name_or_path", "architectures", "attention_probs_dropout_prob", "hidden_dropout_prob",
    "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "dtype",
    "torch_dtype", "transformers_version", "pooler_dropout", "pooler_hidden_act",
    "pooler_hidden_size", "legacy", "tie_word_embeddings", "output_attentions",
    "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id",
    "problem_type", "is_encoder_decoder", "use_cache", "_attn_implementation", "summary_type",
    "summary_use_proj", "summary_activation", "summary_last_dropout", "torchscript",
}  # fmt: skip


def from_hf(hf: Mapping[str, Any]) -> DebertaConfig:
    """The `DebertaConfig` for the dictionary of a `config.json` of `DebertaV2Model`.

    Raises:
      UnsupportedModel: if keys are missing, unknown, or have values that the encoder does not
        support. The message names all of them.
    """
    problems = [
        f"{key} is {hf.get(key)!r}, not {allowed[0]!r}"
        for key, allowed in _REQUIRED.items()
        if hf.get(key) not in allowed
    ]
    problems += [
        f"{key} is {hf[key]!r}, not {allowed[0]!r}"
        for key, allowed in _NEUTRAL.items()
        if key in hf and hf[key] not in allowed
    ]
    wanted = _USED - {"max_relative_positions", "attention_head_size", "embedding_size"}
    problems += [f"{key} is missing" for key in sorted(wanted - set(hf))]
    known = _USED | set(_REQUIRED) | set(_NEUTRAL) | _HARMLESS
    unknown = sorted(key for key in set(hf) - known if not is_off(hf[key]))
    problems += [f"{key} is not supported" for key in unknown]
    if not problems:
        for key in _SIZES:
            size(key, hf[key])
        number("layer_norm_eps", hf["layer_norm_eps"])
        kinds = hf["pos_att_type"]
        kinds = kinds.lower().split("|") if isinstance(kinds, str) else kinds
        kinds = kinds if isinstance(kinds, list) else []
        if {str(kind).strip() for kind in kinds} != {"c2p", "p2c"}:
            problems.append(f"pos_att_type is {hf['pos_att_type']!r}, not 'p2c|c2p'")
        for key, value in (
            ("attention_head_size", hf["hidden_size"] // hf["num_attention_heads"]),
            ("embedding_size", hf["hidden_size"]),
        ):
            if hf.get(key, value) != value:
                problems.append(f"{key} is {hf[key]!r}, not {value}")
    if problems:
        raise UnsupportedModel(
            "config.json: selm_jax/models/deberta.py does not support this DeBERTa-v3 model: "
            + "; ".join(problems)
        )
    distance = hf.get("max_relative_positions", -1)
    if distance != -1:
        size("max_relative_positions", distance)
    return DebertaConfig(
        vocab_size=hf["vocab_size"],
        embed=hf["hidden_size"],
        layers=hf["num_hidden_layers"],
        heads=hf["num_attention_heads"],
        mlp=hf["intermediate_size"],
        norm_eps=hf["layer_norm_eps"],
        buckets=hf["position_buckets"],
        max_distance=distance if distance >= 1 else hf["max_position_embeddings"],
    )
