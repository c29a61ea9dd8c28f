"""One run at a time in a folder, and nobody dead holds it."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading

import pytest

from selm_jax import lock
from selm_jax.artifacts import ArtifactError

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


def test_another_host_that_lives_is_not_disturbed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "LEASE", 30)  # it ends at the first renewal
    file = tmp_path / ".lock"
    file.write_text(json.dumps(ELSEWHERE))
    ended = threading.Event()
    renewing = threading.Thread(target=lock._renew, args=(file, "x", ended))
    renewing.start()
    try:
        with pytest.raises(ArtifactError, match="process 12 on worker-7"):
            lock.only_one(tmp_path).__enter__()
    finally:
        ended.set()
        renewing.join()
    assert json.loads(file.read_text()) == ELSEWHERE


@pytest.mark.parametrize("server_keeps_its_lock", [False, True])
def test_another_host_that_is_dead_is_waited_for_and_succeeded(tmp_path, server_keeps_its_lock):
    import fcntl

    file = tmp_path / ".lock"
    file.write_text(json.dumps(ELSEWHERE))
    with file.open() as kept:
        if server_keeps_its_lock:
            fcntl.flock(kept, fcntl.LOCK_EX)
        with lock.only_one(tmp_path):
            assert json.loads(file.read_text())["process"] == os.getpid()
            with pytest.raises(ArtifactError, match=f"process {os.getpid()}"):
                lock.only_one(tmp_path).__enter__()


def test_a_holder_that_was_succeeded_ends(tmp_path, monkeypatch, capsys):
    """It was suspended for longer than its lease, say, and wakes up."""
    file = tmp_path / ".lock"
    file.write_text(json.dumps(ELSEWHERE))
    ended = threading.Event()

    class Exit(Exception):
        pass

    def leave(status):
        assert status == 1
        raise Exit

    monkeypatch.setattr(os, "_exit", leave)
    with pytest.raises(Exit):
        lock._renew(file, "ours", ended)
    assert "another one has taken over" in capsys.readouterr().err
