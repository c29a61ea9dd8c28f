"""A process that resumes from a bucket fetches what its shards are in, and nothing is made up."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec
from mortal import Mortal

from selm_jax.parallel import multihost
from selm_jax.parallel.mesh import make_mesh
from selm_jax.shell import mirror
from selm_jax.shell.artifacts import ArtifactError
from selm_jax.shell.storage import Store
from selm_jax.training import chunks
from selm_jax.training.checkpoint import Checkpoints
from selm_jax.training.state import TrainState

axes = st.lists(
    st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(0, 6), st.integers(1, 7)),
    max_size=3,
)


@given(axes)
def test_a_part_overlaps_the_chunks_that_its_elements_are_in(axes):
    shape, parts = [size for size, *_ in axes], [part for _, part, *_ in axes]
    index = tuple(slice(min(a, n - 1), max(b, min(a, n - 1) + 1)) for n, _, a, b in axes)
    elements = itertools.product(*(range(n)[cut] for n, cut in zip(shape, index, strict=True)))
    slow = {tuple(i // part for i, part in zip(at, parts, strict=True)) for at in elements}
    found = list(chunks.overlapped(index, shape, parts))
    assert len(found) == len(slow) and set(found) == slow


def test_only_the_shards_of_this_process_are_fetched_and_missing_ones_are_no_zeros(
    tmp_path, monkeypatch
):
    """As if this process had the first of four devices alone."""
    stores = pytest.importorskip("obstore.store")
    inner = Store("gs://bucket/run", stores.MemoryStore())

    def begin(machine: str) -> tuple[Checkpoints, Mortal]:
        monkeypatch.setattr(mirror, "_mirrors", {})
        monkeypatch.setenv("SELM_CACHE", str(tmp_path / machine))
        store = Mortal(inner)
        monkeypatch.setattr(Store, "at", lambda url: store)
        folder = mirror.look(mirror.local(inner.url))
        return Checkpoints(folder / "iteration_1/checkpoints"), store

    mesh = make_mesh((1, 2, 2), jax.devices()[:4])
    _, rows, columns = mesh.axis_names
    split = NamedSharding(mesh, PartitionSpec(rows, columns))
    whole = NamedSharding(mesh, PartitionSpec())
    params = {"w": jax.device_put(jnp.arange(32.0).reshape(4, 8), split)}
    params["b"] = jax.device_put(jnp.arange(3.0), whole)
    saved = TrainState(step=jnp.asarray(5), params=params, opt_state=())
    checkpoints, _ = begin("one")
    checkpoints.save(saved)
    checkpoints.wait()

    other = NamedSharding(mesh, PartitionSpec(None, rows))  # of another mesh than was saved
    params = {"w": jax.device_put(params["w"], other), "b": params["b"]}
    like = TrainState(step=saved.step, params=params, opt_state=())
    checkpoints, store = begin("two")
    found = checkpoints.latest(like)
    assert found is not None and all(jax.tree.leaves(jax.tree.map(np.array_equal, found, saved)))
    assert len(fetched(store)) == 4 + 1 + 1

    indices = chunks._indices
    monkeypatch.setattr(chunks, "_indices", lambda *given: indices(*given)[:1])
    checkpoints, store = begin("three")
    with pytest.raises(Exception, match="error while reading array"):
        checkpoints.latest(like)
    assert fetched(store) == ["params.b/0", "params.w/0.0", "params.w/1.0", "step/0"]

    for key in inner.list():
        if key.endswith("params.w/1.0"):
            inner.delete(key)
    with pytest.raises(ArtifactError, match="its file params.w/1.0 is missing"):
        begin("four")[0].latest(like)


@pytest.mark.parametrize("damage", ["is missing", "was changed or damaged"])
def test_a_bad_small_file_is_found_before_it_is_read_and_told_by_all(tmp_path, monkeypatch, damage):
    """As in the other of two processes, whose own files are good."""
    stores = pytest.importorskip("obstore.store")
    store = Store("gs://bucket/run", stores.MemoryStore())
    monkeypatch.setattr(mirror, "_mirrors", {})
    monkeypatch.setenv("SELM_CACHE", str(tmp_path))
    monkeypatch.setattr(Store, "at", lambda url: store)
    folder = mirror.look(mirror.local(store.url)) / "iteration_1/checkpoints"
    mesh = make_mesh((1, 1, 1), jax.devices()[:1])
    whole = NamedSharding(mesh, PartitionSpec())
    params = {"w": jax.device_put(jnp.arange(4.0), whole)}
    saved = TrainState(step=jnp.asarray(5), params=params, opt_state=())
    checkpoints = Checkpoints(folder)
    checkpoints.save(saved)
    checkpoints.wait()
    (grid,) = (key for key in store.list() if key.endswith("params.w/.zarray"))
    text = store.read(grid)
    store.delete(grid)
    if damage != "is missing":
        store.put(grid, text.replace(b"{", b"[", 1))
    told = []

    def on_every(work):
        told.append(work())
        return [told[-1], []]

    monkeypatch.setattr(multihost, "on_every", on_every)
    with pytest.raises(ArtifactError, match=f"its file params.w/.zarray {damage}"):
        Checkpoints(folder).latest(saved)
    assert told == [[f"its file params.w/.zarray {damage}"]]


def fetched(store: Mortal) -> list[str]:
    """The chunks that were fetched."""
    keys = [key.split("/checkpoints/5/")[-1] for name, key in store.made if name == "fetch"]
    return sorted(key for key in keys if key.rpartition("/")[2][0].isdigit())
