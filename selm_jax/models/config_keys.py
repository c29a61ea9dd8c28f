"""The keys of a `config.json`: which of them are read, which say nothing, and what values they may have.

A key that nobody reads is how log-probabilities become silently wrong. So every key is either read,
or known to say nothing about the function, or off: false, null, 0 or empty. Any other is an error
that names it. A value of the wrong kind, or of an absurd size, is one too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from selm_jax.models.config import UnsupportedModel

Json = dict[str, Any]

# Keys that say nothing about the function that the model computes.
HARMLESS = {
    "_name_or_path", "auto_map", "bos_token_id", "eos_token_id", "dtype", "torch_dtype",
    "initializer_range", "transformers_version", "use_cache", "is_llama_config",
    "transformers.js_config", "unsloth_fixed", "unsloth_version", "model_name", "output_attentions",
    "output_hidden_states", "return_dict", "chunk_size_feed_forward", "label2id", "problem_type",
    "is_encoder_decoder", "cache_implementation", "model_type", "tokenizer_class",
    "_from_model_config", "max_sequence_length", "model_max_length",
    # How attention is computed, not what.
    "_attn_implementation", "_attn_implementation_autoset", "attn_implementation", "pretraining_tp",
    # Of a language model; what they say of a reward model, `families._head_from` reads.
    "architectures", "pad_token_id", "id2label", "num_labels",
    # Dropout of training runs; there is none here.
    "attention_dropout", "resid_pdrop", "embd_pdrop",
    # Settings of generation that early versions of transformers kept here. An experiment has its own.
    "max_length", "min_length", "temperature", "top_k", "top_p", "typical_p", "num_beams",
    "num_beam_groups", "num_return_sequences", "repetition_penalty", "length_penalty",
    "do_sample",
}  # fmt: skip

# Keys that may only have a value under which they change nothing; for most that is not "off".
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
    "is_causal": (True, None),
}

# Beyond what any model has, and small enough that nothing hangs before the tensors are compared.
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
            raise UnsupportedModel(f"config.json: key {key!r} is missing")
        return self._hf.get(key, default)

    def size(self, key: str, default: Any = ..., *, null: bool = False) -> Any:
        """A whole number of at least 1, and not an absurd one; `default` where there is no key.

        Args:
          null: the key may be null, and then is None; so it is where the default is None.
        """
        value = self(key, default)
        return None if value is None and (null or default is None) else size(key, value)

    def number(self, key: str, default: Any = ..., *, null: bool = False) -> Any:
        """A positive number, under the same rules."""
        value = self(key, default)
        return None if value is None and (null or default is None) else number(key, value)

    def count(self, key: str, default: int) -> int:
        """A whole number of at least 0, under the same rules."""
        value = self(key, default)
        return 0 if value == 0 and not isinstance(value, bool) else size(key, value)

    def object(self, key: str, default: Any = {}) -> Any:  # noqa: B006 - nobody changes it
        """A JSON object; null is the default."""
        value = self(key, None)
        if value is not None and not isinstance(value, dict):
            raise UnsupportedModel(f"config.json: {key} is {value!r:.60}; expected an object")
        return default if value is None else value

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false; null is the default."""
        value = self(key, default)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise UnsupportedModel(f"config.json: {key} is {value!r}; expected true or false")
        return value

    def texts(self, key: str) -> list[str] | None:
        """A list of texts, or None."""
        value = self(key, None)
        if value is None:
            return None
        if not (isinstance(value, list) and all(isinstance(x, str) for x in value)):
            raise UnsupportedModel(f"config.json: {key} is {value!r}; expected a list of texts")
        return value

    def only(self, key: str, *allowed: Any) -> None:
        """The key, if it is there, must have a value under which it changes nothing."""
        value = self(key, allowed[0])
        if value not in allowed:
            raise UnsupportedModel(
                f"config.json: {key} is {value!r}; the decoder supports only {allowed[0]!r}"
            )

    def finish(self, family: str) -> None:
        """Refuses what was not read, is not known to be harmless, and is not off."""
        for key, allowed in _NEUTRAL.items():
            if key not in self._read:
                self.only(key, *allowed)
        rest = set(self._hf) - self._read - HARMLESS
        if unknown := {key for key in rest if not is_off(self._hf[key])}:
            said = ", ".join(f"{key} ({self._hf[key]!r:.60})" for key in sorted(unknown))
            raise UnsupportedModel(
                f"config.json: {said}: not read for a {family} model and not known to be harmless. "
                "If it does not change the forward pass, add it to HARMLESS in "
                "selm_jax/models/config_keys.py"
            )


def is_off(value: Any) -> bool:
    """Whether a key with this value asks for nothing: false, null, 0 or empty."""
    return value is None or value in (False, 0, "", [], {})


def size(key: str, value: Any) -> int:
    """Raises UnsupportedModel if the value is no whole number from 1 to an absurd one."""
    most = LIMITS.get(key, _MOST)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= most:
        raise UnsupportedModel(
            f"config.json: {key} is {value!r:.60}; expected a whole number from 1 to {most:,}"
        )
    return value


def number(key: str, value: Any) -> float:
    """Raises UnsupportedModel if the value is no positive number."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value < math.inf):
        raise UnsupportedModel(f"config.json: {key} is {value!r:.60}; expected a positive number")
    return float(value)
