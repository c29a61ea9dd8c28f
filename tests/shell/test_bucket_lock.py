"""At most one process of all hosts holds a lease in a bucket, and a dead one never keeps it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from faulty import Fault

from selm_jax.shell import bucket_lock, storage
from selm_jax.shell.artifacts import ArtifactError
from selm_jax.shell.bucket_lock import followed, held, holder
from selm_jax.shell.storage import StorageError, Store

ELSEWHERE = {"machine": "another", "host": "worker-7", "process": 12, "started": 1, "id": "x"}


# What only depends on conditional writes, which both stores are held to, is tried with one.
on_one_store = pytest.mark.parametrize("bucket", ["gs"], indirect=True)


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bucket_lock, "LEASE", 0.4)
    monkeypatch.setattr(bucket_lock, "RENEW", 0.04)
    monkeypatch.setattr(storage, "_FIRST_WAIT", 0.001)


@pytest.fixture
def store(bucket):
    return Store.at(f"{bucket}/run")


def lock(store):
    return json.loads(store.read(".lock"))


def left_by(store, about, **more):
    store.put(".lock", json.dumps(about | more).encode())


def elsewhere(monkeypatch, name="machine 2"):
    """From now on this process seems to run on another machine."""
    monkeypatch.setattr(bucket_lock, "_machine", lambda: name)


def test_a_second_one_is_told_who_is_there(store):
    refused = pytest.raises(ArtifactError, match=f"process {os.getpid()} on .*another `output`")
    with held(store):
        assert holder(store)["process"] == os.getpid()
        with refused:
            held(store).__enter__()
    assert holder(store) is None and store.read(".lock") == b""
    with held(store):
        pass


@on_one_store
def test_another_host_that_lives_is_not_disturbed(store, monkeypatch):
    monkeypatch.setattr(bucket_lock, "LEASE", 3)  # it ends at the first renewal
    with held(store):
        ours = lock(store)["id"]
        elsewhere(monkeypatch)
        with pytest.raises(ArtifactError, match=f"process {os.getpid()} on "):
            held(store).__enter__()
        assert lock(store)["id"] == ours and holder(store)["id"] == ours


@on_one_store
@pytest.mark.parametrize("off_by", [-600, 600])
def test_another_host_that_is_dead_is_waited_for_whatever_the_clocks_say(
    store, monkeypatch, off_by, capsys
):
    left_by(store, ELSEWHERE)
    time = bucket_lock.time.time
    monkeypatch.setattr(bucket_lock.time, "time", lambda: time() + off_by)
    started = bucket_lock.time.monotonic()
    with held(store):
        assert bucket_lock.time.monotonic() - started >= bucket_lock.LEASE
        assert lock(store)["process"] == os.getpid()
    assert "process 12 on worker-7; waiting up to" in capsys.readouterr().err


@on_one_store
def test_who_looks_compares_the_store_s_times(store, monkeypatch):
    left_by(store, ELSEWHERE)
    monkeypatch.setattr(bucket_lock, "LEASE", 60.0)
    assert holder(store) == ELSEWHERE
    monkeypatch.setattr(bucket_lock, "LEASE", 0.0)
    assert holder(store) is None


HOLD = """
import sys
from selm_jax.shell import bucket_lock
from selm_jax.shell.storage import Store
bucket_lock.LEASE, bucket_lock.RENEW = 0.4, float(sys.argv[2])
if sys.argv[3:]:
    bucket_lock._machine = lambda: sys.argv[3]
store = Store.at(sys.argv[1])
with bucket_lock.held(store):
    print("held", flush=True)
    for key in sys.stdin:
        store.put(key.strip(), b"")
"""


@contextlib.contextmanager
def another(store, renew=0.04):
    """A process that holds the lease until its input ends, and writes the keys that it reads."""
    command = [sys.executable, "-c", HOLD, store.url, str(renew)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


@on_one_store
def test_a_process_that_was_killed_lets_go_at_once_on_its_machine(store, monkeypatch):
    with another(store) as other:
        with pytest.raises(ArtifactError, match=f"process {other.pid} on "):
            held(store).__enter__()
        other.kill()
        other.wait()
    monkeypatch.setattr(bucket_lock, "LEASE", 600.0)
    assert holder(store) is None
    with held(store):
        pass


@on_one_store
@pytest.mark.parametrize("renew", [0.04, 600])
def test_a_process_that_was_suspended_for_too_long_ends(store, monkeypatch, renew):
    """It notices when it renews its lease or, if that is too late, before it writes."""
    with another(store, renew) as other:
        other.send_signal(signal.SIGSTOP)
        with pytest.raises(ArtifactError, match=f"process {other.pid} on "):
            held(store).__enter__()  # on its own machine it is known to live
        elsewhere(monkeypatch)
        with held(store):
            print("late", file=other.stdin, flush=True)
            other.send_signal(signal.SIGCONT)
            assert other.wait(60) == 1
            assert "another one has taken over. This one stops" in other.stderr.read()
            assert lock(store)["process"] == os.getpid()
            assert store.head("late") is None


@on_one_store
@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="this system has no such clock")
def test_a_lease_ages_while_the_machine_is_suspended(store, monkeypatch):
    """Linux's monotonic clock stands still then, and the clock since boot goes on."""
    monkeypatch.setattr(bucket_lock, "LEASE", 60)
    monkeypatch.setattr(bucket_lock, "RENEW", 600)  # so only a write renews it
    read = time.clock_gettime
    with held(store):
        before = lock(store)
        store.put("a", b"")
        assert lock(store) == before
        monkeypatch.setattr(
            time, "clock_gettime", lambda c: read(c) + 3600 * (c == time.CLOCK_BOOTTIME)
        )
        store.put("b", b"")
        assert lock(store) != before


@on_one_store
def test_another_process_of_the_run_writes_only_while_the_first_one_holds_the_lease(store):
    other, refused = Store.at(store.url), pytest.raises(StorageError, match="does not hold")
    with contextlib.ExitStack() as first, followed(other, first.enter_context(held(store))):
        other.put("a", b"")
        first.close()
        with refused:
            for _ in range(1000):  # until it has looked
                other.put("b", b"")
        with refused:
            other.delete("a")
    left_by(store, ELSEWHERE)  # a host that has died: nobody renews its lease
    with followed(other, "x"), refused:
        other.put("c", b"")
    assert store.head("a") is not None and store.head("c") is None


@on_one_store
def test_another_process_of_a_run_that_was_succeeded_ends(store, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(bucket_lock.os, "_exit", lambda status: ended.set())
    left_by(store, ELSEWHERE | {"id": "of the successor"})
    with followed(Store.at(store.url), "x"):
        assert ended.wait(60)


@pytest.mark.parametrize("kind", ["nothing", "a free lock", "a dead host's lock"])
def test_of_many_that_come_at_once_one_enters(store, monkeypatch, kind, tried):
    """Each on a machine of its own. Who is inside leaves when all others were refused."""
    many = 8
    me = threading.local()
    monkeypatch.setattr(bucket_lock, "_machine", lambda: f"machine {me.number}")
    if kind == "a free lock":
        store.put(".lock", b"")
    elif kind != "nothing":
        left_by(store, ELSEWHERE)
    entered, refused = [], threading.Semaphore(0)
    together = threading.Barrier(many)

    def come(number):
        me.number = number
        together.wait()
        try:
            with held(Store.at(store.url)):
                entered.append(number)
                for _ in range(many - 1):
                    assert refused.acquire(timeout=60)
        except ArtifactError as e:
            assert "is using this run folder" in str(e)
            refused.release()

    threads = [threading.Thread(target=come, args=(number,)) for number in range(many)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(entered) == 1
    tried(f"{store.url[:2]}: {kind}, {many} contenders over HTTP: one entered")


@pytest.mark.slow
@on_one_store
@pytest.mark.parametrize("machines", [1, 5])
def test_of_many_processes_one_enters_and_when_it_is_killed_one_succeeds(store, machines, tried):
    many, rounds = 5, 3
    for _ in range(rounds):
        started = [
            subprocess.Popen(
                [sys.executable, "-c", HOLD, store.url, "0.04", f"machine {n % machines}"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for n in range(many)
        ]  # fmt: skip
        said = [process.stdout.readline() for process in started]  # "" at the end of a process
        assert sorted(said) == [""] * (many - 1) + ["held\n"]
        inside = started[said.index("held\n")]
        for process in started:
            if process is not inside:
                assert f"process {inside.pid} on " in process.stderr.read()
        assert lock(store)["process"] == inside.pid and inside.poll() is None
        for process in started:
            process.kill()
            process.communicate()
    tried(
        f"{store.url[:2]}: {rounds} x {many} processes on {machines} machines: one held the lease"
    )


@pytest.mark.parametrize("wrong", [{"lost": True}, {"status": 503, "times": 3}, {"cut": True}])
def test_faults_of_the_store_take_no_lease_away(store, faults, monkeypatch, wrong):
    """They happen while it is taken, renewed and given back."""
    faults.faults[:] = [Fault(method="PUT", **wrong)]
    with held(store):
        assert lock(store)["process"] == os.getpid()
        before = lock(store)["renewal"]
        faults.faults[:] = [Fault(method="PUT", **wrong), Fault(method="HEAD", **wrong)]
        pause = threading.Event()
        for _ in range(600):
            if lock(store)["renewal"] != before and not faults.faults[0].times > 0:
                break
            pause.wait(0.01)
        assert lock(store)["renewal"] != before
        faults.faults[:] = [Fault(method="PUT", **wrong)]
    assert store.read(".lock") == b""


def test_a_renewal_that_was_done_but_given_up_is_known_again(store, faults, monkeypatch):
    """The store is out of reach for longer than a request is tried."""
    monkeypatch.setattr(storage, "LIMIT", 0.0)
    with held(Store.at(store.url)):
        faults.faults[:] = [Fault(method="PUT", lost=True), Fault(status=503, times=5)]
        pause = threading.Event()
        for _ in range(600):
            if faults.faults[1].times <= 0:
                break
            pause.wait(0.01)
        faults.faults.clear()
    assert store.read(".lock") == b""


@on_one_store
@pytest.mark.parametrize("text", [b"my notes", b"[1]", b'{"machine": 3}', b"\xff"])
def test_a_lock_that_is_not_ours_or_damaged_is_named_and_kept(store, text):
    store.put(".lock", text)
    with pytest.raises(ArtifactError, match=r"run/\.lock is damaged or is not a lock of this"):
        held(store).__enter__()
    assert store.read(".lock") == text
