"""Hugging Face folders: what is written is read back bit by bit, what is wrong is listed."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.flax import load_file, save_file

from selm_jax.models.decoder import abstract_params, parameter_count
from selm_jax.weights.huggingface import TENSORS, WeightsError, load, save, to_hf_tensors

CONFIGS = {
    "untied": {},
    "tied": {"tied": True},
    "wide heads": {"head_dim": 12, "kv_heads": 1},
    "mistral": {"window": 5, "layers": 3},
}
DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def assert_same(a, b):
    """Bit by bit, and of the same types."""

    def same(x, y):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()

    jax.tree.map(same, a, b)


@pytest.fixture
def folder(tmp_path, tiny, random_params):
    """(folder, config, {name: tensor}); the tensors are not written yet."""
    config = tiny()
    return tmp_path, config, dict(to_hf_tensors(random_params(config), config))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: t.__name__)
@pytest.mark.parametrize("name", CONFIGS)
def test_load_undoes_save(name, dtype, tiny, random_params, tmp_path):
    config = tiny(**CONFIGS[name])
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(config))
    save(params, config, tmp_path / "model.safetensors")
    assert_same(load(tmp_path, config, dtype=dtype), params)
    # Wider when it is read: nothing is lost.
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    assert_same(load(tmp_path, config), wide)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda t: t.__name__)
def test_the_library_reads_what_is_streamed(dtype, tiny, random_params, tmp_path):
    """The file is written by hand; safetensors itself is the judge, and bytes are in order."""
    config = tiny()
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(config))
    file = tmp_path / "model.safetensors"
    save(params, config, file)
    found = load_file(file)
    for name, tensor in to_hf_tensors(params, config):
        assert_same(found.pop(name), tensor)
    assert not found
    with safe_open(file, framework="numpy") as f:
        assert f.metadata() == {"format": "pt"}
    header = int.from_bytes(file.read_bytes()[:8], "little")
    assert header % 8 == 0
    assert file.stat().st_size == 8 + header + parameter_count(config) * jnp.dtype(dtype).itemsize


def test_saving_twice_gives_the_same_bytes(tiny, random_params, tmp_path):
    for name in ("a", "b"):
        save(random_params(tiny()), tiny(), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_sharded_parameters_are_saved_whole(tiny, random_params, tmp_path):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    params = random_params(tiny())

    def spread(x):  # over the last axis that eight devices can share
        axes = [None] * x.ndim
        if cut := [i for i, n in enumerate(x.shape) if n % 8 == 0]:
            axes[cut[-1]] = "x"
        spec = jax.sharding.PartitionSpec(*axes)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    save(params, tiny(), tmp_path / "one")
    save(jax.tree.map(spread, params), tiny(), tmp_path / "eight")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "eight").read_bytes()


def test_every_parameter_is_placed_once_by_its_path(folder):
    path, config, tensors = folder
    save_file(tensors, path / "model.safetensors")
    seen = []

    def place(where, x):
        assert isinstance(x, np.ndarray) and x.dtype == np.float32
        seen.append(where)
        return jax.device_put(x, jax.devices()[3])

    params = load(path, config, place=place)
    assert sorted(seen) == sorted(flatten_dict(params))
    assert all(x.devices() == {jax.devices()[3]} for x in jax.tree.leaves(params))


def test_indexed_checkpoints(folder, random_params):
    path, config, tensors = folder
    names = sorted(tensors)
    where = {n: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, n in enumerate(names)}
    for file in set(where.values()):
        save_file({n: x for n, x in tensors.items() if where[n] == file}, path / file)
    index = path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert_same(load(path, config), random_params(config))

    lost = where.pop(names[0])
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(WeightsError, match=f"missing: {names[0]}"):
        load(path, config)

    where[names[0]] = next(f for f in where.values() if f != lost)
    index.write_text(json.dumps({"weight_map": where}))
    with pytest.raises(
        WeightsError, match=f"{names[0]} is in {where[names[0]]}, which has no such"
    ):
        load(path, config)

    (path / lost).unlink()
    with pytest.raises(WeightsError, match=f"{lost} is missing"):
        load(path, config)


def test_an_index_that_is_no_index(folder):
    path, config, _ = folder
    for text in ("{", "[]", "{}", '{"weight_map": 3}'):
        (path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(WeightsError, match=r"model\.safetensors\.index\.json"):
            load(path, config)


def test_all_that_is_wrong_is_listed(folder):
    path, config, tensors = folder
    gone = "model.layers.1.self_attn.k_proj.weight"
    odd, unknown = "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"
    del tensors[gone]
    tensors[odd] = tensors[odd][:, :-1]
    tensors[unknown] = np.zeros(32, np.float32)
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(WeightsError) as error:
        load(path, config)
    text = str(error.value)
    assert f"missing: {gone}" in text and f"unknown: {unknown}" in text and str(path) in text
    assert f"{odd}: shape (64, 31), config.json implies (64, 32)" in text


def test_a_transposed_matrix_is_not_taken(folder):
    path, config, tensors = folder
    name = "model.layers.0.mlp.down_proj.weight"
    tensors[name] = tensors[name].T
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(WeightsError, match=name):
        load(path, config)


def test_more_layers_than_the_config_says(folder, tiny):
    path, _, tensors = folder
    save_file(tensors, path / "model.safetensors")
    with pytest.raises(WeightsError, match=r"unknown: model\.layers\.1"):
        load(path, tiny(layers=1))


def test_a_tied_model_may_store_its_head_twice_an_untied_one_must_have_it(folder, tiny):
    path, config, tensors = folder
    save_file(tensors, path / "model.safetensors")
    assert "unembedding" not in load(path, tiny(tied=True))
    del tensors["lm_head.weight"]
    save_file(tensors, path / "model.safetensors")
    assert "unembedding" not in load(path, tiny(tied=True))
    with pytest.raises(WeightsError, match=r"missing: lm_head\.weight"):
        load(path, config)


@pytest.mark.parametrize("left", [0, 4, 8, 200, -1])
def test_a_file_cut_off_is_named(left, folder):
    path, config, tensors = folder
    file = path / "model.safetensors"
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(WeightsError, match=r"model\.safetensors: not a whole safetensors file"):
        load(path, config)


def test_an_empty_folder(tmp_path, tiny):
    with pytest.raises(WeightsError, match=r"model\.safetensors is missing"):
        load(tmp_path, tiny())


def test_the_map_covers_the_tree_and_each_name_once(tiny):
    names = [row.name for row in TENSORS]
    assert len(set(names)) == len(names)
    assert len({row.path for row in TENSORS}) == len(TENSORS)
    for changes in CONFIGS.values():
        paths = set(flatten_dict(abstract_params(tiny(**changes))))
        assert paths <= {row.path for row in TENSORS}
