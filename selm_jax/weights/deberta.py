"""Reads a PairRM folder: its config.json, and its safetensors as parameters of `PairScorer`.

Two layouts are published, with the same tensors under the same names:

- `llm-blender/PairRM-hf`: config.json is that of DebertaV2Model with additional keys for PairRM.
- `llm-blender/PairRM`: config.json is LLM-Blender's `RankerConfig`, which only names the encoder,
  microsoft/deberta-v3-large. `LARGE` is the config of this encoder.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from selm_jax.models.config import UnsupportedModel
from selm_jax.models.config_deberta import DebertaConfig, from_hf
from selm_jax.models.config_keys import size
from selm_jax.models.deberta import Params, abstract_params
from selm_jax.shell.json_file import JsonFileError, read_object
from selm_jax.weights.files import (
    DTYPES,
    Checkpoint,
    WeightsError,
    open_checkpoint,
    refuse_not_finite,
)

# microsoft/deberta-v3-large, with its embedding cut to the 128001 used tokens plus PairRM's four.
LARGE = DebertaConfig(
    vocab_size=128005,
    embed=1024,
    layers=24,
    heads=16,
    mlp=4096,
    norm_eps=1e-7,
    buckets=256,
    max_distance=512,
)


@dataclasses.dataclass(frozen=True)
class PairRMConfig:
    """The hyperparameters in PairRM's config.json.

    Attributes:
      encoder: the encoder's hyperparameters.
      tasks: scores per candidate; their mean is used.
      source_tokens: the most tokens of a source, including [CLS] and [SEP]; longer ones are cut.
      candidate_tokens: the tokens left for each candidate next to the longest source.
      prefix_ids: ids of <|source|>, <|candidate1|>, <|candidate2|>; None if not stated.
    """

    encoder: DebertaConfig
    tasks: int = 1
    source_tokens: int = 1224
    candidate_tokens: int = 412
    prefix_ids: tuple[int, int, int] | None = None


_PREFIX_KEYS = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")
_OWN_KEYS = {*_PREFIX_KEYS, "cand_prefix_id", "n_tasks", "drop_out"}
# The keys of RankerConfig that affect the computation. The others are about its training.
_RANKER = {
    "ranker_type": "pairranker",
    "model_type": "deberta",
    "model_name": "microsoft/deberta-v3-large",
}


def read_config(folder: Path) -> PairRMConfig:
    """Reads the config of the PairRM in `folder`, in either of the two published layouts.

    Raises:
      UnsupportedModel: if it is another model, a key is missing, or a value is not supported.
    """
    file = Path(folder) / "config.json"
    try:
        hf = read_object(file)
        return _from_ranker_config(hf) if "ranker_type" in hf else _from_hf_config(hf)
    except KeyError as missing:
        raise UnsupportedModel(
            f"{file}: key {missing} is missing. Use a PairRM folder"
        ) from missing
    except JsonFileError as e:
        raise UnsupportedModel(str(e)) from e
    except UnsupportedModel as e:
        raise UnsupportedModel(f"{file}: {e}") from e


def _from_ranker_config(hf: Mapping[str, Any]) -> PairRMConfig:
    for key, value in _RANKER.items():
        if hf[key] != value:
            raise UnsupportedModel(f"{key} is {hf[key]!r}; only {value!r} is supported")
    tasks, source, candidate = (
        size(key, hf[key]) for key in ("n_tasks", "source_maxlength", "candidate_maxlength")
    )
    return PairRMConfig(LARGE, tasks, source, candidate)


def _from_hf_config(hf: Mapping[str, Any]) -> PairRMConfig:
    encoder = from_hf({key: value for key, value in hf.items() if key not in _OWN_KEYS})
    source, first, second = (size(key, hf[key]) for key in _PREFIX_KEYS)
    return PairRMConfig(encoder, size("n_tasks", hf["n_tasks"]), prefix_ids=(source, first, second))


_EMBEDDINGS, _ENCODER = "pretrained_model.embeddings.", "pretrained_model.encoder."
_LAYER = _ENCODER + "layer.{}."
_OUTSIDE = {
    "encoder/embedding": (_EMBEDDINGS + "word_embeddings.weight", None),
    "encoder/embedding_norm": (_EMBEDDINGS + "LayerNorm", None),
    "encoder/distances": (_ENCODER + "rel_embeddings.weight", None),
    "encoder/distances_norm": (_ENCODER + "LayerNorm", None),
    "head_in": ("head_layer.1", 1),
    "head_out": ("head_layer.4", 1),
}
_INSIDE = {
    "q": ("attention.self.query_proj", 1),
    "k": ("attention.self.key_proj", 1),
    "v": ("attention.self.value_proj", 1),
    "o": ("attention.output.dense", 2),
    "attention_norm": ("attention.output.LayerNorm", None),
    "up": ("intermediate.dense", 1),
    "down": ("output.dense", 1),
    "mlp_norm": ("output.LayerNorm", None),
}
# Our module -> (their module or tensor, number of leading axes of our kernel that are inputs).
# Our kernels are [*in, *out]; theirs are [out, in].
_MODULES = _OUTSIDE | {
    f"encoder/layers/{ours}": (_LAYER + theirs, inputs)
    for ours, (theirs, inputs) in _INSIDE.items()
}
# A table 0, 1, 2, ... that early versions of transformers stored with the parameters.
_LEFTOVER = {_EMBEDDINGS + "position_ids"}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A parameter: its path and its shape per layer in the tree, and its name in the file."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    name: str
    inputs: int | None

    @property
    def stored_shape(self) -> tuple[int, ...]:
        if self.path[-1] == "bias":
            return (math.prod(self.shape),)
        if self.inputs is None:
            return self.shape
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])

    def kind(self, dtype: Any) -> Any:
        """The parameter's dtype: `dtype` for the encoder's matrices, float32 for all others."""
        return dtype if self.path[0] == "encoder" and len(self.stored_shape) == 2 else np.float32

    def ours(self, stored: np.ndarray) -> np.ndarray:
        is_kernel = self.path[-1] == "kernel"
        return (stored.T if is_kernel else stored).reshape(self.shape)


def _tensors(config: DebertaConfig, tasks: int) -> Iterator[_Tensor]:
    flat = cast(Any, flatten_dict(nn.unbox(abstract_params(config, tasks))))
    for path, leaf in flat.items():
        stacked = "layers" in path
        shape = leaf.shape[1:] if stacked else leaf.shape
        whole = "/".join(path)
        if whole in _MODULES:  # a parameter of the encoder itself
            name, inputs = _MODULES[whole]
        else:
            module, inputs = _MODULES["/".join(path[:-1])]
            name = f"{module}.{'bias' if path[-1] == 'bias' else 'weight'}"
        yield _Tensor(path, shape, name, inputs)


def load(
    folder: Path,
    config: DebertaConfig,
    tasks: int = 1,
    *,
    dtype: Any = jnp.float32,
    place: Callable[[tuple[str, ...], np.ndarray], jax.Array] | None = None,
) -> Params:
    """Reads the parameters of `PairScorer` from `folder`.

    Args:
      folder: the model folder.
      config: the encoder's hyperparameters.
      tasks: scores per candidate.
      dtype: of the encoder's matrices. Norms, biases and the head stay float32.
      place: puts one parameter, given its path, on the devices; by default on the default device.
        At most one parameter (of all layers) is in host memory at a time.

    Raises:
      WeightsError: if tensors are missing, unknown, of the wrong shape or dtype, or contain NaN or
        infinity (all are listed), or a file is missing or incomplete.
    """
    place = place or (lambda path, x: jax.device_put(x))
    tensors = list(_tensors(config, tasks))
    checkpoint = open_checkpoint(folder)
    _check(checkpoint, tensors, config.layers)
    params, not_finite = {}, []

    def read(t: _Tensor, layer: int = 0) -> np.ndarray:
        name = t.name.format(layer)
        stored = checkpoint.read(name)
        if not np.isfinite(stored).all():
            not_finite.append(name)
        return t.ours(stored)

    for t in tensors:
        kind = t.kind(dtype)
        if "layers" in t.path:
            x = np.empty((config.layers, *t.shape), kind)
            for layer in range(config.layers):
                x[layer] = read(t, layer)
        else:
            x = read(t).astype(kind)
        params[t.path] = place(t.path, x)
    refuse_not_finite(checkpoint, not_finite)
    return unflatten_dict(params)


def dtypes(config: DebertaConfig, tasks: int, dtype: Any) -> Params:
    """The dtype of each parameter that `load` returns, as a tree."""
    return unflatten_dict({t.path: np.dtype(t.kind(dtype)) for t in _tensors(config, tasks)})


def _check(checkpoint: Checkpoint, tensors: list[_Tensor], layers: int) -> None:
    wanted = {
        t.name.format(layer): t.stored_shape
        for t in tensors
        for layer in range(layers if "layers" in t.path else 1)
    }
    found = checkpoint.tensors
    problems = [f"missing: {name}" for name in wanted if name not in found]
    problems += [f"unknown: {name}" for name in sorted(set(found) - set(wanted) - _LEFTOVER)]
    problems += [
        f"{name}: {found[name].dtype} of shape {found[name].shape}, but config.json implies floats "
        f"of shape {shape}"
        for name, shape in wanted.items()
        if name in found and (found[name].shape != shape or found[name].dtype not in DTYPES)
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise WeightsError(
            f"{checkpoint.folder}: tensors do not match config.json:\n  {shown}{more}\n"
            "Get config.json and the weights of the same model"
        )
