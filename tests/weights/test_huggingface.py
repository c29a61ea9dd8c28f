"""Hugging Face folders are read back bit by bit, and all faults of a folder are listed."""

from __future__ import annotations

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.flax import load_file, save_file
from safetensors.numpy import save_file as numpy_save

from selm_jax.models.decoder import abstract_params, parameter_count
from selm_jax.models.families import read_config
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, shardings
from selm_jax.weights import multimodal
from selm_jax.weights.files import Checkpoint
from selm_jax.weights.huggingface import WeightsError, load, save, to_hf_tensors
from selm_jax.weights.names import tensors as names_of

# Checkpoints that transformers wrote: one of every family, and more of those that have variants.
FAMILIES = {f.parent.name: f.parent for f in sorted(
    (Path(__file__).parents[1] / "golden" / "families").glob("*/config.json"))}  # fmt: skip
REPEATED = (
    "ministral-3",
    "granite-4",
    "gemma-3",
    "mistral-3-images",
)  # they are stored like others
MESHES = [(1, 8, 1), (2, 2, 2), (1, 4, 2)]  # data, fsdp, tensor

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


@pytest.mark.slow_except("untied-bfloat16", "mistral", "wide heads", "tied-float32")
@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, jnp.float32) for name in CONFIGS), *(("untied", dtype) for dtype in DTYPES[1:])],
)
def test_load_undoes_save(name, dtype, tiny, random_params, tmp_path):
    config = tiny(**CONFIGS[name])
    params = jax.tree.map(lambda x: x.astype(dtype), random_params(config))
    save(params, config, tmp_path)
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
    save(params, config, tmp_path)
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
    assert written(random_params(tiny()), tiny(), tmp_path / "a") == written(
        random_params(tiny()), tiny(), tmp_path / "b"
    )


def written(params, config, folder, **options) -> dict[str, bytes]:
    """The bytes of every file that `save` writes."""
    folder.mkdir()
    save(params, config, folder, **options)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow_except("gpt-oss", "gemma-4", "phi-4-mini", "qwen3-moe", "llama-3.1", "mistral")
@pytest.mark.parametrize(
    ("name", "mesh"),
    [
        pytest.param(name, MESHES[i % 3], marks=[pytest.mark.slow] * (name in REPEATED))
        for i, name in enumerate(FAMILIES)
    ],
)
def test_every_family_comes_and_goes_bit_by_bit(name, mesh, tmp_path):
    """Tensors as transformers wrote them -> shards on eight devices -> the same tensors."""
    folder = FAMILIES[name]
    config = read_config(folder)
    inside = multimodal.around(folder) if multimodal.is_in(folder) else None
    before = load_file(folder / "model.safetensors")
    dtype = next(iter(before.values())).dtype
    where = shardings(abstract_params(config), make_mesh(mesh), TRAINING)
    params = load(folder, config, dtype=dtype, shardings=where)
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(), params, where
    )
    save(params, config, tmp_path, inside=inside)
    after = load_file(tmp_path / "model.safetensors")
    assert after.keys() == before.keys()
    assert_same(after, before)


@pytest.mark.parametrize("mesh", MESHES)
def test_each_byte_of_a_shard_is_read_once(mesh, folder, monkeypatch):
    """Shards that no two devices share are read once and no more of the file than they are."""
    path, config, tensors = folder
    save_file(tensors, path / "model.safetensors")
    read = {}

    def counting(self, name, cuts=()):
        found = plain(self, name, cuts)
        read.setdefault(name, []).append(found.nbytes)
        return found

    plain = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", counting)
    where = shardings(abstract_params(config), make_mesh(mesh), TRAINING)
    params = load(path, config, shardings=where)
    for row in names_of(config).values():
        x = params
        for key in row.path:
            x = x[key]
        replicated = x.sharding.is_fully_replicated
        of_layer = x.nbytes // (config.layers if row.stacked else 1)
        shards = 1 if replicated else len(x.addressable_shards)
        each = x.addressable_shards[0].data.nbytes // (config.layers if row.stacked else 1)
        for layer in range(config.layers if row.stacked else 1):
            assert read[row.name.format(layer)] == [of_layer if replicated else each] * shards


def test_heads_cut_inside(tiny, random_params, tmp_path):
    """Any slice of our axes, also one that is not contiguous in the file."""
    config = tiny()
    params = random_params(config)
    save(params, config, tmp_path)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def spread(x):  # over the last axes that the devices can share, head_dim among them
        axes = [None] * x.ndim
        for name, n in (("x", 4), ("y", 2)):
            if cut := [i for i, m in enumerate(x.shape) if m % n == 0 and axes[i] is None]:
                axes[cut[-1]] = name
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))

    assert_same(load(tmp_path, config, shardings=jax.tree.map(spread, params)), params)


def test_shards_and_index(tiny, random_params, tmp_path):
    """As transformers names them; read back, in one mesh or another, they are the same bits."""
    config = tiny()
    params = random_params(config)
    limit = 20_000
    files = written(params, config, tmp_path / "cut", max_shard_bytes=limit)
    index = json.loads(files.pop("model.safetensors.index.json"))
    count = len(files)
    assert sorted(files) == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert count > 2
    assert index["metadata"] == {"total_size": 4 * parameter_count(config)}
    held = {name: load_file(tmp_path / "cut" / name) for name in files}
    assert index["weight_map"] == {t: name for name, each in held.items() for t in each}
    for each in held.values():
        assert len(each) == 1 or sum(x.nbytes for x in each.values()) <= limit
    assert_same(load(tmp_path / "cut", config), params)
    where = shardings(abstract_params(config), make_mesh((1, 4, 2)), TRAINING)
    spread = load(tmp_path / "cut", config, shardings=where)
    name = "model.safetensors.index.json"
    files[name] = (tmp_path / "cut" / name).read_bytes()
    assert written(spread, config, tmp_path / "again", max_shard_bytes=limit) == files
    # By three processes, each of which writes a part.
    parts = [
        written(spread, config, tmp_path / f"{i}", max_shard_bytes=limit, part=(i, 3))
        for i in range(3)
    ]
    assert all(parts) and sum(map(len, parts)) == len(files) and name in parts[0]
    assert {k: v for each in parts for k, v in each.items()} == files


def test_parameters_are_on_the_first_device_by_default(folder):
    path, config, tensors = folder
    save_file(tensors, path / "model.safetensors")
    assert all(x.devices() == {jax.devices()[0]} for x in jax.tree.leaves(load(path, config)))


def test_parameters_outlive_the_file(folder, random_params):
    """No parameter is a view of the mapped file."""
    path, config, tensors = folder
    save_file(tensors, path / "model.safetensors")
    params = load(path, config)
    with (path / "model.safetensors").open("r+b") as file:
        size = file.seek(0, 2)
        file.seek(0)
        file.write(bytes(size))
    assert_same(params, random_params(config))


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
    for text in ("", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b"}}'):
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
    assert f"{odd}: shape (64, 31), but config.json implies (64, 32)" in text


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
    file, head = path / "model.safetensors", "lm_head.weight"
    other = tensors.pop(head)
    save_file(tensors, file)
    assert "unembedding" not in load(path, tiny(tied=True))
    with pytest.raises(WeightsError, match=r"missing: lm_head\.weight"):
        load(path, config)
    save_file(tensors | {head: tensors["model.embed_tokens.weight"]}, file)
    assert "unembedding" not in load(path, tiny(tied=True))
    save_file(tensors | {head: other}, file)
    with pytest.raises(WeightsError, match=r"lm_head\.weight: differs from .* tie_word_embeddings"):
        load(path, tiny(tied=True))


def test_known_leftovers_are_passed_over(folder, random_params):
    path, config, tensors = folder
    leftover = "model.layers.1.self_attn.rotary_emb.inv_freq"
    save_file(tensors | {leftover: np.ones(4, np.float32)}, path / "model.safetensors")
    assert_same(load(path, config), random_params(config))
    save_file(tensors | {f"{leftover}s": np.ones(4, np.float32)}, path / "model.safetensors")
    with pytest.raises(WeightsError, match=f"unknown: {leftover}s"):
        load(path, config)


@pytest.mark.parametrize(
    ("dtype", "name"), [(np.int8, "I8"), (jnp.float8_e4m3fn, "F8_E4M3"), (np.float64, "F64")]
)
def test_dtypes_that_are_not_read(folder, dtype, name):
    path, config, tensors = folder
    odd = "model.layers.1.mlp.gate_proj.weight"
    torch_like = {n: np.asarray(x) for n, x in tensors.items()}
    torch_like[odd] = torch_like[odd].astype(dtype)
    numpy_save(torch_like, path / "model.safetensors")
    with pytest.raises(WeightsError, match=rf"{odd}: stored as {name}; only F32, F16, BF16"):
        load(path, config)


def test_a_file_with_every_dtype(folder, random_params):
    path, config, tensors = folder
    kinds = [np.float32, jnp.bfloat16, np.float16]
    mixed = {n: x.astype(kinds[i % 3]) for i, (n, x) in enumerate(sorted(tensors.items()))}
    save_file(mixed, path / "model.safetensors")
    wide = {n: x.astype(np.float32) for n, x in mixed.items()}
    (path / "wide").mkdir()
    save_file(wide, path / "wide" / "model.safetensors")
    assert_same(load(path, config), load(path / "wide", config))


@pytest.mark.parametrize("left", [0, 4, 8, 200, -1])
def test_a_file_cut_off_is_named(left, folder):
    path, config, tensors = folder
    file = path / "model.safetensors"
    save_file(tensors, file)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(WeightsError, match=r"model\.safetensors is damaged or cut off"):
        load(path, config)


def test_an_empty_folder(tmp_path, tiny):
    with pytest.raises(WeightsError, match=r"model\.safetensors is missing"):
        load(tmp_path, tiny())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_map_covers_the_tree_and_the_rows_of_fused_tensors(name):
    config = read_config(FAMILIES[name])
    rows = names_of(config)
    assert rows.keys() == flatten_dict(abstract_params(config)).keys()
    ends: dict[tuple[str, range | None], int] = {}
    for row in rows.values():
        assert row.first == ends.get((row.name, row.layers), 0)
        last = row.first + (row.stored_shape[0] if row.of == 1 else 1)
        ends[row.name, row.layers] = last
    assert all(ends[row.name, row.layers] == row.of for row in rows.values() if row.of > 1)
