"""PairRM's folders: the facts in config.json, and safetensors -> the parameters of `PairScorer`.

Two layouts are published, with the same tensors under the same names:

- `llm-blender/PairRM-hf`: config.json is DebertaV2Model's, with PairRM's own keys beside them.
- `llm-blender/PairRM`: config.json is LLM-Blender's `RankerConfig`, which names the encoder,
  microsoft/deberta-v3-large, in place of describing it. `LARGE` is what the name stands for.
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

# microsoft/deberta-v3-large, its embedding cut to the 128001 tokens in use and PairRM's four.
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
    """What config.json says.

    Attributes:
      encoder: the facts of the encoder.
      tasks: scores per candidate, of which the mean counts.
      source_tokens: a source is cut to so many tokens, [CLS] and [SEP] among them.
      candidate_tokens: so many are left for each candidate beside the longest source.
      prefix_ids: ids of <|source|>, <|candidate1|>, <|candidate2|>; None where not stated.
    """

    encoder: DebertaConfig
    tasks: int = 1
    source_tokens: int = 1224
    candidate_tokens: int = 412
    prefix_ids: tuple[int, int, int] | None = None


_PREFIX_KEYS = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id")
_OWN_KEYS = {*_PREFIX_KEYS, "cand_prefix_id", "n_tasks", "drop_out"}
# Of RankerConfig's keys those that decide what is computed. The others are about its training.
_RANKER = {
    "ranker_type": "pairranker",
    "model_type": "deberta",
    "model_name": "microsoft/deberta-v3-large",
}


def read_config(folder: Path) -> PairRMConfig:
    """The facts of the PairRM in `folder`, in either layout.

    Raises:
      UnsupportedModel: another model, a missing key, or a value that is not computed here.
    """
    file = Path(folder) / "config.json"
    try:
        hf = read_object(file)
        return _from_ranker_config(hf) if "ranker_type" in hf else _from_hf_config(hf)
    except KeyError as missing:
        raise UnsupportedModel(f"{file}: key {missing} is missing; is this PairRM?") from missing
    except JsonFileError as e:
        raise UnsupportedModel(str(e)) from e
    except UnsupportedModel as e:
        raise UnsupportedModel(f"{file}: {e}") from e


def _from_ranker_config(hf: Mapping[str, Any]) -> PairRMConfig:
    for key, value in _RANKER.items():
        if hf[key] != value:
            raise UnsupportedModel(f"{key} is {hf[key]!r}; this version knows {value!r} alone")
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
# Our module -> their module (or tensor), and how many leading axes of our kernel are its inputs.
# Our kernels are [*in, *out]; theirs are [out, in].
_MODULES = _OUTSIDE | {
    f"encoder/layers/{ours}": (_LAYER + theirs, inputs)
    for ours, (theirs, inputs) in _INSIDE.items()
}
# A table 0, 1, 2, ... that early versions of transformers stored with the parameters.
_LEFTOVER = {_EMBEDDINGS + "position_ids"}


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """One parameter: our path, the shape of one layer of it, and what it is called there."""

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
        """Its dtype: `dtype` for the encoder's matrices; norms, biases and the head are float32."""
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
      dtype: of the encoder's matrices. Norms, biases and the head stay float32.
      place: puts one finished parameter on the devices, given its path; by default on the default
        device. No more than one parameter, of all layers, is in host memory at a time.

    Raises:
      WeightsError: tensors missing, unknown, of the wrong shape or dtype, or with NaN or infinity
        (all are listed), or a file that is missing or not whole.
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
    """The dtype of each parameter that `load` gives, as a tree of `PairScorer`'s."""
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
        f"{name}: {found[name].dtype} of shape {found[name].shape}, config.json implies floats of "
        f"shape {shape}"
        for name, shape in wanted.items()
        if name in found and (found[name].shape != shape or found[name].dtype not in DTYPES)
    ]
    if problems:
        shown = "\n  ".join(problems[:20])
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise WeightsError(
            f"{checkpoint.folder}: tensors do not match config.json:\n  {shown}{more}"
        )
