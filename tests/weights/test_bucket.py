"""Weights are read from a bucket as from a folder, and no more of them than is needed."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from selm_jax.models.decoder import abstract_params
from selm_jax.models.families import read_config
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, shardings
from selm_jax.shell.storage import Store
from selm_jax.weights import sources
from selm_jax.weights.bucket import BucketModelError
from selm_jax.weights.files import open_checkpoint
from selm_jax.weights.folder import problems_of
from selm_jax.weights.gguf import convert
from selm_jax.weights.huggingface import checked_config, load, save
from selm_jax.weights.sources import SourceError, resolve


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_gguf):
    """A model in two files with an index, and its parameters."""
    where = tmp_path_factory.mktemp("source")
    folder = convert(tiny_gguf(where / "tiny.gguf"), where / "model")
    params = load(folder, read_config(folder))
    (folder / "model.safetensors").unlink()
    save(params, read_config(folder), folder, max_shard_bytes=150_000)
    assert len([*folder.glob("*.safetensors")]) >= 2
    return folder


@pytest.fixture
def url(model, bucket):
    store = Store.at(f"{bucket}/models/tiny")
    for file in model.iterdir():
        store.put(file.name, file)
    store.put("optimizer.pt", b"nobody wants this")
    store.put("onnx/model.safetensors", b"nor this")
    return store.url


@pytest.fixture
def read(monkeypatch):
    """The spans of weights that are read, in order."""
    spans, real = [], Store.read_range

    def read_range(self, key, start, stop, **more):
        spans.append((key, start, stop))
        return real(self, key, start, stop, **more)

    monkeypatch.setattr(Store, "read_range", read_range)
    return spans


def test_weights_are_read_where_they_lie(url, model, tmp_path, read):
    found = resolve(f"{url}/", cache=tmp_path)
    assert found.origin["kind"] == "bucket" and not problems_of(found.path)
    assert not [*found.path.rglob("*.safetensors")] and not (found.path / "optimizer.pt").exists()
    read.clear()
    config = checked_config(found.path)
    assert not read  # the headers were kept
    where = shardings(abstract_params(config), make_mesh((2, 2, 2)), TRAINING)
    got, expected = (load(each, config, shardings=where) for each in (found.path, model))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), got, expected)
    total = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    assert sum(stop - start for _, start, stop in read) <= total  # once, by eight devices
    assert resolve(url, cache=tmp_path) == type(found)(found.path, found.origin | {"source": url})


def test_parameters_of_one_tensor_are_read_together(model, bucket, tmp_path, read):
    """The gates and the ups of gpt-oss's experts alternate in one tensor."""
    golden = Path(__file__).parents[1] / "golden" / "families" / "gpt-oss"
    store = Store.at(f"{bucket}/models/gpt-oss")
    for file in (*golden.glob("*.json"), golden / "model.safetensors", model / "tokenizer.json"):
        store.put(file.name, file)
    found = resolve(store.url, cache=tmp_path).path
    read.clear()
    config = read_config(found)
    where = shardings(abstract_params(config), make_mesh((1, 4, 2)), TRAINING)
    got, expected = (load(each, config, shardings=where) for each in (found, golden))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), got, expected)
    each = open_checkpoint(golden).tensors.values()
    assert sum(stop - start for _, start, stop in read) == sum(tensor.bytes for tensor in each)
    assert len(read) == len(set(read))


def test_a_part_costs_its_rows(url, model, tmp_path, read):
    here, there = open_checkpoint(model), open_checkpoint(resolve(url, cache=tmp_path).path)
    name = "model.layers.1.mlp.up_proj.weight"
    rows, columns = there.tensors[name].shape
    for cuts in [(), (slice(2, 5),), (slice(2, 5), slice(1, 3)), (slice(None), slice(1, 3))]:
        read.clear()
        np.testing.assert_array_equal(there.read(name, cuts), here.read(name, cuts))
        wanted = len(range(rows)[cuts[0]]) if cuts else rows
        assert [stop - start for _, start, stop in read] in ([4 * columns * wanted], [])
    assert there.file_of == here.file_of


def test_other_programs_get_files(url, model, tmp_path):
    found = resolve(url, cache=tmp_path, whole=True)
    for file in model.iterdir():
        assert (found.path / file.name).read_bytes() == file.read_bytes()
    assert found.path != resolve(url, cache=tmp_path).path


def test_weights_that_are_replaced_make_another_copy(url, model, tmp_path):
    before = resolve(url, cache=tmp_path)
    checkpoint = open_checkpoint(before.path)
    file = min(checkpoint.file_of.values())
    name = next(n for n, f in checkpoint.file_of.items() if f == file)
    changed = bytearray((model / file).read_bytes())
    changed[-1] ^= 1
    Store.at(url).put(file, bytes(changed))
    with pytest.raises(BucketModelError, match=f"{file} was replaced or deleted while"):
        checkpoint.read(name)
    after = resolve(url, cache=tmp_path)
    assert after.path != before.path and after.origin != before.origin
    assert open_checkpoint(after.path).read(name) is not None


def test_what_is_missing_or_damaged_is_named(url, model, bucket, tmp_path):
    store = Store.at(url)
    with pytest.raises(BucketModelError, match="nowhere: there is no model in this folder"):
        resolve(f"{bucket}/nowhere", cache=tmp_path)
    with pytest.raises(SourceError, match="has no revision 'main'; omit it"):
        resolve(url, revision="main", cache=tmp_path)
    file = min(model.glob("*.safetensors"))
    whole = file.read_bytes()
    for wrong in (whole[:-1], whole[:9], b"", b"\xff" * 100, b"\2\0\0\0\0\0\0\0[]"):
        store.put(file.name, wrong)
        with pytest.raises(BucketModelError, match=f"{file.name} is damaged, cut off, or no"):
            resolve(url, cache=tmp_path)
    store.delete(file.name)
    with pytest.raises(SourceError, match=f"{file.name} is missing .*Complete it in the bucket"):
        resolve(url, cache=tmp_path)
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("split", [0, 9])
def test_a_gguf_file_is_converted_and_its_copy_deleted(
    tiny_gguf, bucket, tmp_path, split, monkeypatch
):
    (tmp_path / "here").mkdir()
    first = tiny_gguf(tmp_path / "here" / "m.gguf", split=split)
    store = Store.at(f"{bucket}/gguf-{split}")
    for file in first.parent.iterdir():
        store.put(file.name, file)
    source, cache = f"{store.url}/{first.name}", tmp_path / "cache"
    found = resolve(source, cache=cache)
    expected = convert(first, tmp_path / "expected")
    for file in expected.iterdir():
        assert (found.path / file.name).read_bytes() == file.read_bytes(), file.name
    assert not [*cache.rglob("*.gguf")]
    monkeypatch.setattr(sources, "convert", None)  # a second call would fail
    assert resolve(source, cache=cache) == found
    last = max(first.parent.iterdir())
    store.delete(last.name)
    with pytest.raises(SourceError, match=f"{last.name}: there is no such file in the bucket"):
        resolve(source, cache=cache)
