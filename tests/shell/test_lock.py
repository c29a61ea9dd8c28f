"""At most one run uses a folder at a time, and a dead process never keeps its lock."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import signal
import threading

import interleaved
import pytest

from selm_jax.shell import lock
from selm_jax.shell.artifacts import ArtifactError

ELSEWHERE = {"machine": "another", "host": "worker-7", "process": 12, "id": "x"}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 0.5)
    monkeypatch.setattr(lock, "RENEW", 0.05)


def test_a_second_one_is_told_who_is_there(tmp_path):
    refused = pytest.raises(ArtifactError, match=f"process {os.getpid()} on .*another `output`")
    with lock.only_one(tmp_path), refused:
        lock.only_one(tmp_path).__enter__()
    with lock.only_one(tmp_path):
        pass
    assert (tmp_path / ".lock").read_text() == ""


def _hold(folder, ready):
    with lock.only_one(folder):
        ready.set()
        threading.Event().wait()


def test_a_killed_process_lets_go_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=_hold, args=(tmp_path, ready))
    process.start()
    assert ready.wait(120)
    with pytest.raises(ArtifactError, match=f"process {process.pid} on "):
        lock.only_one(tmp_path).__enter__()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with lock.only_one(tmp_path):
        pass


def held(folder):
    """The file of the lock that somebody holds."""
    (file,) = folder.glob(".lock.*")
    return file


def left_by(folder, holder, name=".lock." + 32 * "a"):
    file = folder / name
    file.write_text(json.dumps(holder))
    return file


def test_another_host_that_lives_is_not_disturbed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 30)  # it ends at the first renewal
    file = left_by(tmp_path, ELSEWHERE)
    ended = threading.Event()
    renewing = threading.Thread(target=lock._renew, args=(file, ended))
    renewing.start()
    try:
        with pytest.raises(ArtifactError, match="process 12 on worker-7"):
            lock.only_one(tmp_path).__enter__()
    finally:
        ended.set()
        renewing.join()
    assert held(tmp_path) == file and json.loads(file.read_text()) == ELSEWHERE


@pytest.mark.parametrize("server_keeps_its_lock", [False, True])
@pytest.mark.parametrize(
    "name", [".lock." + 32 * "a", ".lock"]
)  # as a version before this one left it
def test_another_host_that_is_dead_is_waited_for_and_succeeded(
    tmp_path, server_keeps_its_lock, name
):
    import fcntl

    file = left_by(tmp_path, ELSEWHERE, name)
    with file.open() as kept:
        if server_keeps_its_lock:
            fcntl.flock(kept, fcntl.LOCK_EX)
        with lock.only_one(tmp_path):
            assert json.loads(held(tmp_path).read_text())["process"] == os.getpid()
            with pytest.raises(ArtifactError, match=f"process {os.getpid()}"):
                lock.only_one(tmp_path).__enter__()
    assert [each.name for each in sorted(tmp_path.iterdir())] == [".lock", ".selm"]


def test_a_holder_that_was_succeeded_ends(tmp_path, monkeypatch, capsys):
    """It was suspended for longer than its lease, say, and wakes up."""
    left_by(tmp_path, ELSEWHERE)

    class Exit(Exception):
        pass

    def leave(status):
        assert status == 1
        raise Exit

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Exit):
        lock._renew(tmp_path / (".lock." + 32 * "b"), threading.Event())
    assert "another one has taken over" in capsys.readouterr().err


def test_a_holder_that_was_succeeded_frees_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEW", 60)
    first = lock.only_one(tmp_path)
    first.__enter__()
    file = held(tmp_path).rename(tmp_path / (".lock." + 32 * "b"))
    first.__exit__(None, None, None)
    assert held(tmp_path) == file and not (tmp_path / ".lock").exists()


@pytest.mark.parametrize("name", [".lock", ".lock." + 32 * "a"])
@pytest.mark.parametrize("text", ["my notes", "[1]", '{"machine": 3}', "\udc80"])
def test_a_lock_that_is_not_ours_or_damaged_is_named_and_kept(tmp_path, name, text):
    file = tmp_path / name
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    (tmp_path / ".selm").write_text("selm_jax made this folder, and replaces files in it.\n")
    before = file.read_bytes()
    with pytest.raises(ArtifactError, match=f"{name} is damaged or is not a lock of this program"):
        lock.only_one(tmp_path).__enter__()
    assert file.read_bytes() == before


ORDERS = 25
FILES = {lock.__file__, __file__}


def _left(folder, kind):
    """What lies in a folder when several come to it; whether the dead one is known by that."""
    if kind == "a dead host's lock":
        left_by(folder, ELSEWHERE)
    elif kind == "a dead host's lock of an older version":
        left_by(folder, ELSEWHERE, ".lock")
    elif kind == "two dead hosts' locks":
        left_by(folder, ELSEWHERE)
        left_by(folder, ELSEWHERE, ".lock." + 32 * "b")
    elif kind == "a dead process's lock of this machine":
        left_by(folder, ELSEWHERE | {"machine": "machine 0"})
    elif kind == "a free lock":
        (folder / ".lock").touch()


@pytest.mark.parametrize(
    "kind",
    [
        "nothing", "a free lock", "a dead host's lock", "a dead host's lock of an older version",
        "two dead hosts' locks", "a dead process's lock of this machine",
    ],
)  # fmt: skip
@pytest.mark.parametrize("machines", [3, 1])
def test_however_they_interleave_one_alone_is_inside(tmp_path, monkeypatch, kind, machines, tried):
    """Three processes take the lock at the same time, on three machines or one, in random order.

    The flocks of one machine are not seen on the others. Holders that this test starts count as
    alive; the locks that were there before belong to dead ones.
    """
    me = threading.local()
    monkeypatch.setattr(lock, "_machine", lambda: f"machine {me.number % machines}")
    monkeypatch.setattr(lock, "RENEW", 600.0)  # the threads that renew have nothing to do
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    if machines == 3:
        monkeypatch.setattr(lock.fcntl, "flock", lambda handle, how: None)

    def wait(folder, file, holder):
        if holder.get("id") != ELSEWHERE["id"]:
            raise ArtifactError("it lives: refused")

    monkeypatch.setattr(lock, "_wait_for_its_end", wait)
    entered = 0
    for seed in range(ORDERS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        _left(folder, kind)
        lock.claim(folder)
        inside, most, times = set(), [], itertools.count()

        def come(number, folder=folder, inside=inside, most=most, times=times):
            me.number = number
            try:
                with lock.only_one(folder):
                    next(times)
                    inside.add(number)
                    most.append(len(inside))
                    for _ in range(8):
                        pass  # the others have their turns meanwhile
                    inside.remove(number)
            except ArtifactError as e:
                assert "refused" in str(e) or "is using this run folder" in str(e)

        interleaved.run([lambda n=n: come(n) for n in range(3)], FILES, seed)
        assert max(most, default=0) <= 1, f"seed {seed}: {max(most)} inside at once"
        entered += next(times)
    tried(
        f"{kind}, 3 contenders on {machines} machines: {ORDERS} orders, {entered} entered, "
        "no two at once"
    )
    assert entered >= 0.8 * ORDERS
