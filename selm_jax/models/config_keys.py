"""Reads the keys of a `config.json` and refuses keys that are unknown or have bad values.

If a key is silently ignored, log-probabilities may be silently wrong. So every key must be read, or
known to have no effect on the model's function, or be off: false, null, 0 or empty. Any other key
is an error that names it, and so is a value of the wrong type or of an absurd size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from selm_jax.models.config import UnsupportedModel

Json = dict[str, Any]

# Keys without effect on the function that the model computes.
HARMLESS = {
    "_name_or_path", "auto_map", "bos_token_id", "eos_token_id", "dtype", "torch_dtype",
    "initializer_range", "transformers_version", "use_cache", "is_llama_config",
    "transformers.js_config", "unsloth_fixed", "unsloth_version", "model_name", "output_attentions",
    "output_hidden_states", "return_dict", "chunk_size_feed_forward", "label2id", "problem_type",
    "is_encoder_decoder", "cache_implementation", "model_type", "tokenizer_class",
    "_from_model_config", "max_sequence_length", "model_max_length",
    # How attention is computed, not what it computes.
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "pretraining_tp",
    # No effect in a language model; for a reward model `families._head_from` reads them.
    "architectures", "pad_token_id", "id2label", "num_labels",
    # Parts of training which this package does not use: dropout, and for mixtures of experts the
    # loss for an even load and noise in the router.
    "attention_dropout", "resid_pdrop", "embd_pdrop", "output_router_logits",
    "router_aux_loss_coef", "router_jitter_noise",
    # Generation settings of early versions of transformers. An experiment has its own.
    "max_length", "min_length", "temperature", "top_k", "top_p", "typical_p", "num_beams",
    "num_beam_groups", "num_return_sequences", "repetition_penalty", "length_penalty",
    "do_sample",
}  # fmt: skip

# Keys that may only have a value with which they change nothing; for most it is not "off".
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "is_causal": (True, None),
}

# Larger than in any model, but small enough that nothing hangs before the tensors are compared.
LIMITS = {
    "num_hidden_layers": 10_000,
    "vocab_size": 10**8,
    "max_position_embeddings": 10**9,
    "sliding_window": 10**9,
}
_MOST = 10**7


class Keys:
    """A `config.json` that remembers which of its keys were read."""

    def __init__(self, hf: Mapping[str, Any]):
        self._hf, self._read = hf, set()

    def __call__(self, key: str, default: Any = ...) -> Any:
        self._read.add(key)
        if default is ... and key not in self._hf:
            raise UnsupportedModel(
                f"config.json: key {key!r} is missing. Download the file again from the "
                "model's source"
            )
        return self._hf.get(key, default)

    def size(self, key: str, default: Any = ..., *, null: bool = False) -> Any:
        """The key's value, a whole number of at least 1; `default` if the key is missing.

        Args:
          key: the key.
          default: the value of a missing key; without a default, a missing key is an error.
          null: whether the key may be null, which gives None. It may also if the default is None.
        """
        value = self(key, default)
        return None if value is None and (null or default is None) else size(key, value)

    def number(self, key: str, default: Any = ..., *, null: bool = False) -> Any:
        """The key's value, a positive number; arguments as for `size`."""
        value = self(key, default)
        return None if value is None and (null or default is None) else number(key, value)

    def count(self, key: str, default: int) -> int:
        """The key's value, a whole number of at least 0; `default` if the key is missing."""
        value = self(key, default)
        return 0 if value == 0 and not isinstance(value, bool) else size(key, value)

    def object(self, key: str, default: Any = {}) -> Any:  # noqa: B006 - nobody changes it
        """The key's value, a JSON object; `default` if it is missing or null."""
        value = self(key, None)
        if value is not None and not isinstance(value, dict):
            raise UnsupportedModel(f"config.json: {key} is {value!r:.60}; expected an object")
        return default if value is None else value

    def flag(self, key: str, default: bool = False) -> bool:
        """The key's value, true or false; `default` if it is missing or null."""
        value = self(key, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UnsupportedModel(f"config.json: {key} is {value!r}; expected true or false")
        return value

    def texts(self, key: str) -> list[str] | None:
        """The key's value, a list of strings; None if it is missing or null."""
        value = self(key, None)
        if value is None:
            return None
        if not (isinstance(value, list) and all(isinstance(x, str) for x in value)):
            raise UnsupportedModel(f"config.json: {key} is {value!r}; expected a list of strings")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """Raises UnsupportedModel if the key exists and its value is not one of `allowed`."""
        value = self(key, allowed[0])
        if value not in allowed:
            raise UnsupportedModel(
                f"config.json: {key} is {value!r}; the decoder supports only {allowed[0]!r}. Use "
                "another model"
            )

    def finish(self, family: str) -> None:
        """Raises UnsupportedModel if a key was not read, unless it is harmless or turned off."""
        for key, allowed in _NEUTRAL.items():
            if key not in self._read:
                self.only(key, *allowed)
        rest = set(self._hf) - self._read - HARMLESS
        if unknown := {key for key in rest if not is_off(self._hf[key])}:
            said = ", ".join(f"{key} ({self._hf[key]!r:.60})" for key in sorted(unknown))
            raise UnsupportedModel(
                f"config.json: {said}: not supported for a {family} model, and not known to "
                "be harmless. If a key does not change the forward pass, add it to HARMLESS in "
                "selm_jax/models/config_keys.py"
            )


def is_off(value: Any) -> bool:
    """Returns whether a config value turns off the feature of its key: false, null, 0 or empty."""
    return value is None or value in (False, 0, "", [], {})


def size(key: str, value: Any) -> int:
    """The value if it is a whole number from 1 to its limit; raises UnsupportedModel otherwise."""
    most = LIMITS.get(key, _MOST)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UnsupportedModel(
            f"config.json: {key} is {value!r:.60}; expected a whole number from 1 to {most:,}"
        )
    return value


def number(key: str, value: Any) -> float:
    """The value as a float if it is a positive number; raises UnsupportedModel otherwise."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf):
        raise UnsupportedModel(f"config.json: {key} is {value!r:.60}; expected a positive number")
    return float(value)
