"""The mesh and its table of rules: what fits is placed, what does not is an error by name."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from selm_jax.models.decoder import abstract_adapters, abstract_params
from selm_jax.models.lora import Lora
from selm_jax.parallel.mesh import AXES, MeshError, make_mesh
from selm_jax.parallel.rules import TRAINING, partition, shardings


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
def test_one_size_takes_what_is_left(asked, got):
    mesh = make_mesh(asked)
    assert tuple(mesh.shape.values()) == got and mesh.axis_names == AXES
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert sorted(d.id for d in mesh.devices.flat) == list(range(8))


def test_some_of_the_devices():
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


def test_what_cannot_be_cut_is_named(tiny):
    mesh = make_mesh((1, 1, 8))
    with pytest.raises(MeshError, match=r"layers/attention/k.*'kv_heads' of size 2.*8"):
        shardings(abstract_params(tiny(heads=8)), mesh, TRAINING)
    with pytest.raises(MeshError, match=r"batch: axis 'rows' of size 6"):
        partition("batch", ("rows",), (6,), make_mesh((1, 8, 1)), TRAINING)


def test_a_table_that_cuts_two_axes_alike_is_refused(tiny):
    mesh = make_mesh((1, 4, 2))
    with pytest.raises(MeshError, match="two of its axes.*'tensor'"):
        shardings(abstract_params(tiny()), mesh, {**TRAINING, "embed": "tensor"})


def test_a_table_that_lacks_an_axis_is_refused(tiny):
    rules = {k: v for k, v in TRAINING.items() if k != "mlp"}
    with pytest.raises(MeshError, match="no rule for its axis 'mlp'"):
        shardings(abstract_params(tiny()), make_mesh((1, 8, 1)), rules)


def test_the_table_names_no_axis_that_nothing_has(tiny):
    used = set()
    for tree in (abstract_params(tiny()), abstract_adapters(tiny(), Lora(rank=4, alpha=8))):
        boxes = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "names"))
        used |= {axis for box in boxes for axis in box.names}
    assert set(TRAINING) == used | {"rows"}
