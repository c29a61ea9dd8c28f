"""The mesh and its sharding rules: arrays that do not fit are errors that name them."""

from __future__ import annotations

import dataclasses
import math
from functools import cache
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

from selm_jax.models.config import Mixture
from selm_jax.models.decoder import Decoder, abstract_adapters, abstract_params
from selm_jax.models.families import read_config
from selm_jax.models.lora import Lora
from selm_jax.parallel.mesh import AXES, MeshError, decode_mesh, make_mesh
from selm_jax.parallel.rules import (
    DECODE,
    PRESETS,
    TRAINING,
    check_preset,
    partition,
    row_shardings,
    shardings,
)


def test_eight_devices_are_there():
    assert len(jax.devices()) == 8


@pytest.mark.parametrize(
    ("asked", "got"),
    [
        ((1, -1, 1), (1, 8, 1)),
        ((2, -1, 2), (2, 2, 2)),
        ((-1, 4, 1), (2, 4, 1)),
        ((8, 1, -1), (8, 1, 1)),
        ((1, 1, 8), (1, 1, 8)),
    ],
)
def test_one_axis_takes_the_remaining_devices(asked, got):
    mesh = make_mesh(asked)
    assert tuple(mesh.shape.values()) == got and mesh.axis_names == AXES
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


def test_a_mesh_of_some_of_the_devices():
    mesh = make_mesh((1, -1, 1), jax.devices()[2:5])
    assert [d.id for d in mesh.devices.flat] == [2, 3, 4]


@pytest.mark.parametrize("sizes", [(-1, -1, 1), (3, 1, 1), (3, -1, 1), (16, -1, 1), (0, -1, 1)])
def test_sizes_that_do_not_fit(sizes):
    with pytest.raises(MeshError, match="data.*fsdp.*tensor"):
        make_mesh(sizes)


@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 4, 2), (8, 1, 1)])
def test_every_parameter_is_cut_as_its_rule_says(sizes, tiny, random_params):
    config, mesh = tiny(), make_mesh(sizes)
    where = shardings(abstract_params(config), mesh, TRAINING)
    params = jax.tree.map(jax.device_put, random_params(config), where)
    _, fsdp, tensor = sizes

    def share(x):
        return x.addressable_shards[0].data.size / x.size

    attention, mlp = params["layers"]["attention"], params["layers"]["mlp"]
    for x in (*attention.values(), *mlp.values(), params["embedding"], params["unembedding"]):
        assert share(x) == 1 / (fsdp * tensor)
    for x in (params["norm"]["scale"], params["layers"]["mlp_norm"]["scale"]):
        assert share(x) == 1
    jax.tree.map(np.testing.assert_array_equal, params, random_params(config))


def test_rows_are_cut_over_data_and_fsdp():
    mesh = make_mesh((2, 2, 2))
    sharding = partition("batch", ("rows", None), (4, 7), mesh, TRAINING)
    assert sharding.spec == PartitionSpec(("data", "fsdp"), None)
    mesh = make_mesh((1, 8, 1))
    assert partition("batch", ("rows",), (8,), mesh, TRAINING).spec == PartitionSpec("fsdp")


@pytest.mark.parametrize("remat", ["none", "full"])
def test_each_device_holds_the_activations_of_its_own_rows(tiny, remat):
    config, mesh = tiny(), make_mesh((1, 8, 1))
    abstract = abstract_params(config)
    decoder = Decoder(config, remat=remat, mesh=mesh)

    def loss(params, tokens):
        positions = jnp.broadcast_to(jnp.arange(16), tokens.shape)
        return decoder.apply({"params": params}, tokens, positions)[0].sum()

    where = shardings(abstract, mesh, TRAINING)
    rows = jax.ShapeDtypeStruct((8, 16), jnp.int32)
    places = (where, row_shardings(rows, mesh))
    gradients = jax.jit(jax.grad(loss), in_shardings=places, out_shardings=where)
    text = gradients.lower(nn.unbox(abstract), rows).compile().as_text()
    assert f"1,16,{config.mlp}]" in text and f"8,16,{config.mlp}]" not in text


def test_what_cannot_be_cut_is_named(tiny):
    mesh = make_mesh((1, 1, 8))
    with pytest.raises(MeshError, match=r"layers/attention/k.*'kv_heads' of size 2.*8"):
        shardings(abstract_params(tiny(heads=8)), mesh, TRAINING)
    with pytest.raises(MeshError, match=r"batch: axis 'rows' of size 6"):
        partition("batch", ("rows",), (6,), make_mesh((1, 8, 1)), TRAINING)


def test_a_table_that_cuts_two_axes_alike_is_refused(tiny):
    mesh = make_mesh((1, 4, 2))
    with pytest.raises(MeshError, match="more than one of its axes.*'tensor'"):
        shardings(abstract_params(tiny()), mesh, {**TRAINING, "embed": "tensor"})


def test_a_table_that_lacks_an_axis_is_refused(tiny):
    rules = {k: v for k, v in TRAINING.items() if k != "mlp"}
    with pytest.raises(MeshError, match="there is no rule for its axis 'mlp'"):
        shardings(abstract_params(tiny()), make_mesh((1, 8, 1)), rules)


def test_a_rule_for_an_axis_that_the_mesh_lacks_is_refused(tiny):
    rules = {**TRAINING, "mlp": "tensr"}
    with pytest.raises(MeshError, match=r"layers/mlp/down: its axis 'mlp'.*'tensr'.*data, fsdp"):
        shardings(abstract_params(tiny()), make_mesh((1, 8, 1)), rules)


# --- slices, presets, copies for decoding ------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Chip:
    """The attributes of a TPU device that a mesh reads."""

    id: int
    slice_index: int
    process_index: int = 0
    platform: str = "fake"
    device_kind: str = "fake"


def test_slices_are_joined_on_the_given_axes():
    chips = [Chip(i, i % 2) for i in range(16)]  # listed in turns
    for dcn, axis in (((2, 1, 1), 0), ((1, 2, 1), 1)):
        mesh = make_mesh((2, -1, 2), chips, dcn=dcn)
        assert dict(mesh.shape) == {"data": 2 * dcn[0], "fsdp": 2 * dcn[1], "tensor": 2}
        # Along that axis the slice changes once, half-way; along the others never.
        slices = np.vectorize(lambda chip: chip.slice_index)(mesh.devices)
        assert np.abs(np.diff(slices, axis=axis)).sum() == 16 / 2 / slices.shape[axis] * 2
        for other in {0, 1, 2} - {axis}:
            assert not np.diff(slices, axis=other).any()
        # A copy that decodes lies within one slice.
        copies = decode_mesh(mesh, 4).devices.reshape(-1, 4)
        assert all(len({chip.slice_index for chip in copy}) == 1 for copy in copies)


def test_slices_that_are_not_there_are_refused():
    with pytest.raises(MeshError, match="need 2 slices; the 8 devices form 1"):
        make_mesh((1, -1, 1), dcn=(2, 1, 1))
    with pytest.raises(MeshError, match="in 3 slices do not cover the 8 devices"):
        make_mesh((1, -1, 1), dcn=(3, 1, 1))
    with pytest.raises(MeshError, match="sizes must be at least 1"):
        make_mesh((1, -1, 1), dcn=(0, 1, 1))


@pytest.mark.parametrize(
    ("preset", "sizes", "named"),
    [
        ("single", (1, 8, 1), "'fsdp' has 8"),
        ("single", (8, 1, 1), "'data' has 8"),
        ("fsdp", (1, 4, 2), "'tensor' has 2"),
    ],
)
def test_devices_that_would_repeat_the_same_work_are_refused(preset, sizes, named):
    with pytest.raises(MeshError, match=f"{preset!r}, but the mesh axis {named} devices"):
        check_preset(preset, make_mesh(sizes))


def test_presets_take_the_meshes_they_are_for():
    check_preset("single", make_mesh((1, 1, 1), jax.devices()[:1]))
    check_preset("fsdp", make_mesh((2, 4, 1)))
    check_preset("fsdp_tensor", make_mesh((2, 2, 2)))
    with pytest.raises(MeshError, match="'fsbp'; expected one of single, fsdp, fsdp_tensor"):
        check_preset("fsbp", make_mesh((1, 8, 1)))


def test_copies_for_decoding_are_neighbours_in_the_same_order():
    mesh = make_mesh((1, 8, 1))
    for tensor in (1, 2, 8):
        copies = decode_mesh(mesh, tensor)
        assert dict(copies.shape) == {"data": 8 // tensor, "fsdp": 1, "tensor": tensor}
        assert list(copies.devices.flat) == list(mesh.devices.flat)
    for tensor in (0, 3, 16):
        with pytest.raises(MeshError, match=f"decode_tensor is {tensor}.*8 devices"):
            decode_mesh(mesh, tensor)


# --- every family under every preset -----------------------------------------------------------

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = sorted(p.parent for p in (GOLDEN / "families").glob("*/config.json"))
PUBLISHED = sorted(p.parent for p in (GOLDEN / "published").glob("*/config.json"))
# Which mesh axis cuts what; all else is whole on every device.
CUTS = {
    "single": {},
    "fsdp": {"embed": "fsdp"},
    "fsdp_tensor": {
        "embed": "fsdp", "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor",
        "mlp": "tensor", "experts": "tensor",
    },
    "decode": {
        "vocab": "tensor", "heads": "tensor", "kv_heads": "tensor", "mlp": "tensor",
        "experts": "tensor",
    },
}  # fmt: skip


def every_mesh(preset: str, most: int):
    """Sizes of meshes that a preset is for, with up to `most` devices; real ones where there are
    enough devices."""
    sizes = {
        "single": [(1, 1, 1)],
        "fsdp": [(1, 8, 1), (2, 4, 1), (4, 8, 1), (2, 16, 1)],
        "fsdp_tensor": [(1, 4, 2), (2, 2, 2), (1, 4, 8), (4, 8, 8)],
        "decode": [(8, 1, 1), (4, 1, 2), (4, 1, 8), (32, 1, 8)],
    }[preset]
    for each in sizes:
        if math.prod(each) <= 8:
            yield make_mesh(each, jax.devices()[: math.prod(each)])
        elif math.prod(each) <= most:
            yield AbstractMesh(each, AXES)


@cache
def trees_of(folder: Path):
    """Abstract parameters and adapters of a model; tracing them takes longer than all else here."""
    config = read_config(folder)
    targets = "_proj$" if config.mixture is None else "self_attn"  # experts have no adapters
    lora = Lora(rank=4, alpha=8, targets=targets)
    return [abstract_params(config), abstract_adapters(config, lora)]


@pytest.mark.parametrize("preset", CUTS)
def test_every_parameter_of_every_family_has_its_place(preset, tried):
    """Tiny ones on 8 devices, published ones on up to 256: parameters and adapters."""
    rules = DECODE if preset == "decode" else PRESETS[preset]
    walked = 0
    for folder in FAMILIES + PUBLISHED:
        trees = trees_of(folder)
        for mesh in every_mesh(preset, 256 if folder in PUBLISHED else 8):
            for tree in trees:
                boxes = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "names"))
                places = jax.tree.leaves(shardings(tree, mesh, rules))
                for box, place in zip(boxes, places, strict=True):
                    cut = [mesh.shape.get(CUTS[preset].get(name), 1) for name in box.names]
                    expected = tuple(n // c for n, c in zip(box.value.shape, cut, strict=True))
                    assert place.shard_shape(box.value.shape) == expected
                    walked += 1
    models = len(FAMILIES + PUBLISHED)
    tried(f"preset {preset}: {walked} parameters and adapters of {models} models placed")
    assert walked > 100


def test_every_axis_of_the_tables_is_used(tiny):
    used = set()
    trees = [abstract_params(tiny()), abstract_params(tiny(mixture=Mixture(4, 2, True)))]
    for tree in (*trees, abstract_adapters(tiny(), Lora(rank=4, alpha=8))):
        boxes = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "names"))
        used |= {axis for box in boxes for axis in box.names if axis is not None}
    for rules in PRESETS.values():
        assert set(rules) == used | {"rows"}
    assert set(DECODE) == used | {"slots"}


def test_the_largest_paper_model_leaves_room_on_small_chips():
    """Bytes per chip of v5e:4x8 (16 GiB each), from the shardings alone: float32 parameters and two
    moments, cut over 32; and bfloat16 copies for decoding on 8 neighbours."""
    config = read_config(GOLDEN / "published" / "Meta-Llama-3-8B-Instruct")

    def bytes_of(mesh, rules, each):
        tree = abstract_params(config)
        boxes = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "names"))
        places = jax.tree.leaves(shardings(tree, mesh, rules))
        return each * sum(
            math.prod(p.shard_shape(b.value.shape)) for b, p in zip(boxes, places, strict=True)
        )

    training = bytes_of(AbstractMesh((1, 32, 1), AXES), TRAINING, 4 * 3)
    decoding = bytes_of(AbstractMesh((4, 1, 8), AXES), DECODE, 2)
    assert training == pytest.approx(8.03e9 * 12 / 32, rel=0.01)
    assert decoding == pytest.approx(8.03e9 * 2 / 8, rel=0.01)
