"""Checkpoints are complete or absent, are sharded, and can be restored onto any mesh."""

from __future__ import annotations

import contextlib
import errno
import json
import random
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from selm_jax.models.decoder import abstract_params
from selm_jax.parallel import multihost
from selm_jax.parallel.mesh import make_mesh
from selm_jax.parallel.rules import TRAINING, shardings
from selm_jax.shell.artifacts import ArtifactError
from selm_jax.training import checkpoint as checkpoint_module
from selm_jax.training.checkpoint import Checkpoints
from selm_jax.training.optimizer import optimizer
from selm_jax.training.state import TrainState

ADAM = optimizer("adamw", b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)


@pytest.fixture(scope="module")
def state_on(tiny, random_params):
    """state_on(sizes, step) -> a state of training whose moments are not zero, on such a mesh."""
    config = tiny()

    def make(sizes, step=0):
        mesh = make_mesh(sizes, jax.devices()[: int(np.prod(sizes))])
        where = shardings(abstract_params(config), mesh, TRAINING)
        fresh = jax.tree.map(np.array, random_params(config))  # some tests donate them
        params = jax.tree.map(jax.device_put, fresh, where)
        state = TrainState.create(params, ADAM)
        _, moments = ADAM.update(params, state.opt_state, params)
        return state.replace(opt_state=moments, step=state.step + step)

    return make


def values(tree):
    return [np.array(x) for x in jax.tree.leaves(tree)]


def same(a, b) -> bool:
    return all(np.array_equal(x, y) for x, y in zip(values(a), values(b), strict=True))


@pytest.mark.slow_except("sizes1", "sizes3")
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2), (1, 4, 1), (1, 1, 1)])
def test_a_state_is_restored_onto_any_mesh(state_on, sizes, tmp_path, tried):
    saved = state_on((1, 4, 2), 7)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(saved)
    checkpoints.wait()
    like = state_on(sizes)
    found = Checkpoints(tmp_path).latest(like)
    assert int(found.step) == 7 and same(found, saved)
    for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(like), strict=True):
        assert x.sharding == y.sharding
    tried(f"checkpoint of mesh (1, 4, 2) restored onto {sizes}: the same bits")


def test_what_is_saved_is_the_state_as_it_was(state_on, tmp_path):
    """The next update takes the memory of a state that is still being written."""
    state = state_on((1, 8, 1), 1)
    expected = values(state)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    spoil = jax.jit(lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0)
    jax.block_until_ready(spoil(state))
    checkpoints.wait()
    found = checkpoints.latest(state_on((1, 8, 1)))
    for x, y in zip(values(found), expected, strict=True):
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("keep", [1, 2])
def test_the_newest_checkpoints_are_kept_and_at_the_end_only_the_last(state_on, tmp_path, keep):
    checkpoints = Checkpoints(tmp_path, keep=keep)
    for step in (1, 2, 3):
        checkpoints.save(state_on((1, 1, 1), step))
        assert checkpoints.steps() or step == 1  # one is always whole
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2, 3][-keep:]
    params = state_on((1, 1, 1)).params
    checkpoints.save_final(params)
    assert checkpoints.steps() == [] and checkpoints.has_final
    assert same(checkpoints.final(params), params)


def test_an_unfinished_checkpoint_does_not_count(state_on, tmp_path):
    state = state_on((1, 1, 1), 5)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    checkpoints.wait()
    torn = tmp_path / "9.orbax-checkpoint-tmp-1"
    shutil.copytree(tmp_path / "5", torn)
    (torn / "whole.json").unlink()
    assert Checkpoints(tmp_path).steps() == [5]
    assert int(Checkpoints(tmp_path).latest(state).step) == 5
    checkpoints.save(state_on((1, 1, 1), 6))
    checkpoints.wait()
    assert not torn.exists()


def test_every_missing_or_short_file_is_named(state_on, tmp_path, tried):
    state = state_on((1, 8, 1), 3)
    checkpoints = Checkpoints(tmp_path / "whole")
    checkpoints.save(state)
    checkpoints.wait()
    names = list(json.loads((tmp_path / "whole/3/whole.json").read_text())["files"])
    faults = 0
    for name in [*names, "whole.json"]:
        for fault in ("missing", "cut"):
            folder = tmp_path / "faulty"
            shutil.copytree(tmp_path / "whole", folder)
            file = folder / "3" / name
            if fault == "missing":
                file.unlink()
            elif file.stat().st_size:
                file.write_bytes(file.read_bytes()[:-2])  # one may be the last new line of JSON
            else:
                shutil.rmtree(folder)
                continue
            with pytest.raises(ArtifactError, match=f"3: .*{name}.*Delete the folder"):
                Checkpoints(folder).latest(state)
            shutil.rmtree(folder)
            faults += 1
    tried(f"checkpoint of {len(names)} files: {faults} missing or cut ones, each named")
    assert faults > 6


def test_a_flipped_bit_in_any_file_is_named_or_read_by_nobody(state_on, tmp_path, tried):
    """Three bits of each file. What orbax writes after all else is not restored from."""
    state = state_on((1, 8, 1), 3)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    checkpoints.wait()
    chance, refused, unread = random.Random(0), 0, []
    for file in sorted(file for file in (tmp_path / "3").rglob("*") if file.is_file()):
        whole = file.read_bytes()
        for _ in range(3):
            at = chance.randrange(8 * len(whole))
            damaged = bytearray(whole)
            damaged[at // 8] ^= 1 << at % 8
            file.write_bytes(damaged)
            try:
                assert same(Checkpoints(tmp_path).latest(state), state)
                unread.append(file.name)
            except ArtifactError as e:
                assert f"{file.name} " in str(e) and "Delete the folder" in str(e)
                refused += 1
        file.write_bytes(whole)
    tried(f"checkpoint with one bit flipped: {refused} refused by name, {len(unread)} unread")
    assert set(unread) <= {"_CHECKPOINT_METADATA", "commit_success.txt"} and refused > 30


def test_each_of_several_processes_hashes_what_it_wrote_and_its_share_of_what_it_reads(
    state_on, tmp_path, monkeypatch
):
    """Played by one: what the other process has told of its file is taken, and not hashed again."""
    told = {"ocdbt.process_1/d/shard": (5, "its digest")}
    hashed = []
    real = checkpoint_module.sha256_of

    def counting(files):
        files = list(files)
        hashed.extend(file.name for file in files)
        return real(files)

    monkeypatch.setattr(checkpoint_module, "sha256_of", counting)
    monkeypatch.setattr(multihost, "left", lambda name: [told])
    state = state_on((1, 1, 1), 4)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    checkpoints.wait()
    files = json.loads((tmp_path / "4/whole.json").read_text())["files"]
    assert files["ocdbt.process_1/d/shard"] == [5, "its digest"]
    monkeypatch.undo()
    shares = []
    for i in range(3):
        hashed.clear()
        monkeypatch.setattr(checkpoint_module, "sha256_of", counting)
        monkeypatch.setattr(multihost, "index", lambda i=i: i)
        monkeypatch.setattr(multihost, "count", lambda: 3)
        monkeypatch.setattr(multihost, "on_first", lambda work: work())
        monkeypatch.setattr(multihost, "on_every", lambda work: [work()])
        with contextlib.suppress(ArtifactError):  # the shard of the other is not there
            Checkpoints(tmp_path).latest(state)
        shares.append(list(hashed))
        monkeypatch.undo()
    assert all(shares)
    assert sorted(name for share in shares for name in share) == sorted(
        Path(f).name for f in files if f not in told
    )


@pytest.mark.parametrize(
    "name", ["a[1]", "[ab]", "a*", "a?", "a\\b", "a:b", "s3:", "a b", "a%20b#"]
)
def test_a_folder_of_any_name(state_on, name, tmp_path, monkeypatch):
    """To the libraries below, some names are patterns, and a backslash is a slash."""
    monkeypatch.setenv("SELM_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = Path(name) / "checkpoints"
    saved, like = state_on((1, 2, 1), 7), state_on((1, 1, 1))
    checkpoints = Checkpoints(folder)
    checkpoints.save(saved)
    checkpoints.wait()
    assert same(Checkpoints(folder).latest(like), saved)
    checkpoints.save_final(saved.params)
    assert same(Checkpoints(folder).final(like.params), saved.params)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "cache") == [name]
    checkpoints.delete()
    assert not folder.exists()


def test_a_cache_folder_of_an_odd_name_does_not_help(state_on, tmp_path, monkeypatch):
    monkeypatch.setenv("SELM_CACHE", str(tmp_path / "[cache]"))
    with pytest.raises(ArtifactError, match="set SELM_CACHE to another folder"):
        Checkpoints(tmp_path / "a[1]").save(state_on((1, 1, 1), 1))


def test_what_was_logged_until_a_checkpoint_belongs_to_it(state_on, tmp_path):
    state = state_on((1, 1, 1), 2)
    checkpoints = Checkpoints(tmp_path, logged=lambda step: f"until {step}")
    checkpoints.save(state)
    checkpoints.wait()
    assert int(checkpoints.latest(state).step) == 2
    with pytest.raises(ArtifactError, match="metrics.jsonl about this training's first 2 updates"):
        Checkpoints(tmp_path, logged=lambda step: "otherwise").latest(state)


def test_a_checkpoint_of_another_start_is_refused(state_on, tmp_path):
    state = state_on((1, 1, 1), 2)
    checkpoints = Checkpoints(tmp_path, start="aaaa")
    checkpoints.save(state)
    checkpoints.wait()
    with pytest.raises(ArtifactError, match="digest aaaa, but the model there now has digest bbbb"):
        Checkpoints(tmp_path, start="bbbb").latest(state)


def test_a_save_that_fails_says_so_and_leaves_the_one_before(state_on, tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state_on((1, 1, 1), 1))
    checkpoints.wait()

    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("selm_jax.shell.artifacts.flush", full)
        checkpoints.save(state_on((1, 1, 1), 2))
        with pytest.raises(ArtifactError, match="No space left on device.*is undamaged"):
            checkpoints.wait()
    assert checkpoints.steps() == [1]
    checkpoints.save(state_on((1, 1, 1), 2))
    checkpoints.wait()
    assert checkpoints.steps() == [2]
    assert jnp.array_equal(checkpoints.latest(state_on((1, 1, 1))).step, 2)
