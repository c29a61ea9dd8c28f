"""Maps each parameter to its name and layout in a Hugging Face folder.

`tensors(config)` is the whole map; reading and writing both use it, so they cannot disagree. Our
kernels are [*in, *out] with a separate axis for heads; Hugging Face's are [out, in]. Some families
store several kernels in one tensor, concatenated along the outputs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import flax.linen as nn
from flax.traverse_util import flatten_dict

from selm_jax.models.config import DecoderConfig
from selm_jax.models.decoder import LAYER_SCALE, abstract_params
from selm_jax.models.stacked import stack_names

Path = tuple[str, ...]


class Tensor(NamedTuple):
    """The name and the layout with which a file stores one parameter.

    Attributes:
      path: the parameter's path in our tree.
      shape: its shape there, for one layer and one expert.
      name: the name of the stored tensor; `{}` is the number of the layer.
      inputs: how many leading axes of our kernel are its inputs. A kernel is flattened to
        [inputs, outputs] and transposed; None means that the parameter is stored as it is.
      first: the row of the stored tensor at which this parameter begins; 0 unless it is fused.
      layers: the layers whose parameters are stacked in this one, in order; None if it does not
        belong to a layer.
      experts: the number of experts of a layer if each of them is a stored tensor. Then the shape
        is one expert's, and `name` has a second `{}`, for the number of the expert.
      of: how many parameters alternate along the last axis of the stored tensor; `first` is then
        this one's place among them, and not a row.
    """

    path: Path
    shape: tuple[int, ...]
    name: str
    inputs: int | None
    first: int = 0
    layers: range | None = None
    experts: int | None = None
    of: int = 1

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """The shape of one layer of the parameter in our tree, or of the whole if not stacked."""
        return self.shape if self.experts is None else (self.experts, *self.shape)

    def names(self, layer: int | None) -> list[str]:
        """The stored tensors of a layer of this parameter: one, or one for each expert.

        `layer` is the number of the layer in the model, of which there is none outside of layers.
        """
        return [self.name.format(layer, expert) for expert in range(self.experts or 1)]

    @property
    def stacked(self) -> bool:
        return self.layers is not None

    def at(self, layer: int | None) -> int | None:
        """The index of a layer in the stacked parameter; None for one that is not stacked."""
        return None if self.layers is None else self.layers.index(cast(int, layer))

    @property
    def kernel(self) -> str:
        """The parameter's name in its layer, such as `attention/q`."""
        return "/".join(self.path[-2:])

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of this parameter's part of the stored tensor."""
        if self.inputs is None:
            flat = self.path[-1].endswith("_bias") and self.path[-2] == "attention"
            return (math.prod(self.shape),) if flat else self.shape
        return math.prod(self.shape[self.inputs :]), math.prod(self.shape[: self.inputs])


_LAYER = "model.layers.{}."
_OUTSIDE = {
    ("embedding",): ("model.embed_tokens.weight", None),
    ("unembedding",): ("lm_head.weight", None),
    ("score",): ("score.weight", None),
    ("norm", "scale"): ("model.norm.weight", None),
}
_KERNELS = {
    ("attention", "q"): ("self_attn.q_proj", 1),
    ("attention", "k"): ("self_attn.k_proj", 1),
    ("attention", "v"): ("self_attn.v_proj", 1),
    ("attention", "o"): ("self_attn.o_proj", 2),
    ("mlp", "gate"): ("mlp.gate_proj", 1),
    ("mlp", "up"): ("mlp.up_proj", 1),
    ("mlp", "down"): ("mlp.down_proj", 1),
}
_NORMS = {
    ("attention_norm",): "input_layernorm",
    ("mlp_norm",): "post_attention_layernorm",
    ("attention", "q_norm"): "self_attn.q_norm",
    ("attention", "k_norm"): "self_attn.k_norm",
}
# In models with post-norms, `post_attention_layernorm` is the norm after attention; in others it is
# the norm before the MLP.
_POST_NORMS = {
    ("attention_post_norm",): "post_attention_layernorm",
    ("mlp_norm",): "pre_feedforward_layernorm",
    ("mlp_post_norm",): "post_feedforward_layernorm",
}
_EXPERTS = {
    ("experts", "router"): "mlp.gate",
    ("experts", "gate"): "mlp.experts.{}.gate_proj",
    ("experts", "up"): "mlp.experts.{}.up_proj",
    ("experts", "down"): "mlp.experts.{}.down_proj",
}
# Names that a class of models has in place of these.
_OTHER_NAMES = {
    "MixtralForCausalLM": {
        ("experts", "router"): "block_sparse_moe.gate",
        ("experts", "gate"): "block_sparse_moe.experts.{}.w1",
        ("experts", "up"): "block_sparse_moe.experts.{}.w3",
        ("experts", "down"): "block_sparse_moe.experts.{}.w2",
    },
    "GptOssForCausalLM": {("experts", "router"): "mlp.router"},
    "Glm4ForCausalLM": {
        ("attention_post_norm",): "post_self_attn_layernorm",
        ("mlp_norm",): "post_attention_layernorm",
        ("mlp_post_norm",): "post_mlp_layernorm",
    },
    "GraniteMoeHybridForCausalLM": {("mlp", "down"): "shared_mlp.output_linear"},
}
# Parameters that are stored as they are, by their tensor's name. If there is more than one, their
# numbers alternate along the last axis.
_AS_THEY_ARE = {
    "GptOssForCausalLM": {
        "self_attn.sinks": (("attention", "sinks"),),
        "mlp.router.bias": (("experts", "router_bias"),),
        "mlp.experts.gate_up_proj": (("experts", "gate"), ("experts", "up")),
        "mlp.experts.gate_up_proj_bias": (("experts", "gate_bias"), ("experts", "up_bias")),
        "mlp.experts.down_proj": (("experts", "down"),),
        "mlp.experts.down_proj_bias": (("experts", "down_bias"),),
    },
}
# Kernels stored as one tensor, in this order.
_FUSED = {
    "Phi3ForCausalLM": {
        "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    },
    "Glm4ForCausalLM": {"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")},
    "GraniteMoeHybridForCausalLM": {
        "shared_mlp.input_linear": ("mlp.gate_proj", "mlp.up_proj"),
    },
}


def tensors(config: DecoderConfig) -> dict[Path, Tensor]:
    """Maps every parameter to its `Tensor`, in a fixed order; parts of a tensor are adjacent."""
    leaves = cast(dict[Path, Any], flatten_dict(nn.unbox(abstract_params(config))))
    rows = {path: _tensor(path, leaf.shape, config) for path, leaf in leaves.items()}
    fused = _FUSED.get(config.architecture, {})
    return _fuse(rows, fused) if fused else rows


def _tensor(path: Path, shape: tuple[int, ...], config: DecoderConfig) -> Tensor:
    if path in _OUTSIDE:
        name, inputs = _OUTSIDE[path]
        return Tensor(path, shape, name, inputs)
    cycle, place, inner = config.cycle, 0, path[1:]
    if cycle > 1:
        place, inner = stack_names(cycle).index(path[1]), path[2:]
    row = _of_layers(path, inner, shape, config)
    return row._replace(layers=range(place, config.layers, cycle))


def _of_layers(path: Path, inner: Path, shape: tuple[int, ...], config: DecoderConfig) -> Tensor:
    """The tensor of a stacked parameter, whose path inside of its layer is `inner`."""
    if inner == (LAYER_SCALE,):
        return Tensor(path, shape[1:], f"{_LAYER}layer_scalar", None)
    for name, parts in _AS_THEY_ARE.get(config.architecture, {}).items():
        if inner in parts:
            return Tensor(
                path, shape[1:], f"{_LAYER}{name}", None, first=parts.index(inner), of=len(parts)
            )
    other = _OTHER_NAMES.get(config.architecture, {})
    if name := (_EXPERTS | other).get((inner[0], inner[-1])):
        row = Tensor(path, shape[1:], f"{_LAYER}{name}.weight", 1)
        return row._replace(shape=shape[2:], experts=shape[1]) if len(shape) == 4 else row
    norms = _NORMS | (_POST_NORMS if config.post_norms else {}) | other
    if inner[-1] == "scale":
        return Tensor(path, shape[1:], f"{_LAYER}{norms[inner[:-1]]}.weight", None)
    kernel = (inner[0], inner[1].removesuffix("_bias"))
    name, inputs = _KERNELS[kernel]
    if kernel != inner:
        return Tensor(path, shape[1:], f"{_LAYER}{name}.bias", None)
    return Tensor(path, shape[1:], f"{_LAYER}{name}.weight", inputs)


def _fuse(rows: dict[Path, Tensor], fused: dict[str, tuple[str, ...]]) -> dict[Path, Tensor]:
    by_name, rest = {row.name: row for row in rows.values()}, dict(rows)
    moved = {}
    for whole, parts in fused.items():
        first = 0
        for part in parts:
            row = rest.pop(by_name[f"{_LAYER}{part}.weight"].path)
            moved[row.path] = row._replace(name=f"{_LAYER}{whole}.weight", first=first)
            first += row.stored_shape[0]
    return rest | moved


def stored_tensors(config: DecoderConfig) -> Iterator[tuple[list[str], int | None, list[Tensor]]]:
    """Yields (names, layer, parameters) for all stored tensors, ordered by layer.

    There is more than one name if each expert is a tensor of its own.
    """
    together = in_one_tensor(config)
    for parts in together:
        if parts[0].layers is None:
            yield parts[0].names(None), None, parts
    for layer in range(config.layers):
        for parts in together:
            if layer in (parts[0].layers or ()):
                yield parts[0].names(layer), layer, parts


def in_one_tensor(config: DecoderConfig) -> list[list[Tensor]]:
    """Lists which parameters are stored together: usually each by itself."""
    found: dict[tuple[str, range | None], list[Tensor]] = {}
    for row in tensors(config).values():
        found.setdefault((row.name, row.layers), []).append(row)
    return list(found.values())


def whole_shape(parts: list[Tensor]) -> tuple[int, ...]:
    """Returns the shape of a stored tensor whose parts are concatenated, or alternate."""
    shapes = [row.stored_shape for row in parts]
    if parts[0].of > 1:
        return *shapes[0][:-1], parts[0].of * shapes[0][-1]
    return sum(shape[0] for shape in shapes), *shapes[0][1:]


def stored_axes(row: Tensor) -> list[tuple[int, ...]]:
    """Lists, for each axis of the stored tensor, the axes of our parameter that it combines."""
    axes = tuple(range(len(row.shape)))
    if row.inputs is not None:  # [*in, *out] is stored as [out, in]
        return [axes[row.inputs :], axes[: row.inputs]]
    return [axes] if len(row.stored_shape) == 1 else [(axis,) for axis in axes]
