"""Whatever the network and the server do, each request has its effect once, or fails in words."""

from __future__ import annotations

import threading

import pytest
from faulty import Fault

from selm_jax.shell import storage
from selm_jax.shell.storage import Conflict, StorageError, Store


@pytest.fixture
def store(bucket, monkeypatch):
    monkeypatch.setattr(storage, "_FIRST_WAIT", 0.001)
    return Store.at(f"{bucket}/run")


PASSING = {
    "429 twice": {"status": 429, "times": 2},
    "500": {"status": 500},
    "503 three times": {"status": 503, "times": 3},
    "refused twice": {"refused": True, "times": 2},
    "done, but not answered": {"lost": True},
    "cut in the middle of the answer": {"cut": True},
}
OLD, NEW = b"old" * 100, b"new" * 200


def fetched(store, folder):
    store.fetch("old", folder / "file")
    return [each.read_bytes() for each in folder.iterdir()]


# What a store is asked, given the entry of `old`; then the answer, and the contents afterwards.
ASKED = {
    "put": (lambda s, old, _: s.put("new", NEW).size, 600, {"old": OLD, "new": NEW}),
    "put if absent": (
        lambda s, old, _: s.put("new", NEW, if_absent=True).size, 600, {"old": OLD, "new": NEW}
    ),
    "put if unchanged": (
        lambda s, old, _: s.put("old", NEW, if_version=old.version).size, 600, {"old": NEW}
    ),
    "read": (lambda s, old, _: s.read("old"), OLD, {"old": OLD}),
    "read a range": (lambda s, old, _: s.read_range("old", 1, 7), b"ldoldo", {"old": OLD}),
    "fetch": (lambda s, old, folder: fetched(s, folder), [OLD], {"old": OLD}),
    "head": (lambda s, old, _: s.head("old") == old, True, {"old": OLD}),
    "list": (lambda s, old, _: s.list() == {"old": old}, True, {"old": OLD}),
    "delete": (lambda s, old, _: s.delete("old"), None, {}),
}  # fmt: skip


@pytest.mark.parametrize("fault", PASSING)
def test_a_fault_that_passes_is_not_noticed(store, faults, fault, tmp_path, tried):
    """The fault is met by the first request of everything that can be asked, or by the second."""
    met = 0
    for what, (ask, answer, left) in ASKED.items():
        for skip in (0, 1):
            store.delete("new")
            old = store.put("old", OLD)
            trouble = Fault(**PASSING[fault], skip=skip)
            faults.faults[:] = [trouble]
            assert ask(store, old, tmp_path) == answer, (what, skip)
            met += trouble.times <= 0
            faults.faults.clear()
            assert {key: store.read(key) for key in store.list()} == left, (what, skip)
    assert met >= 10
    tried(f"{store.url[:2]}: {fault}: met {met} times, never noticed")


@pytest.mark.slow
@pytest.mark.parametrize("fault", PASSING)
def test_a_part_that_fails_does_not_fail_the_file(store, faults, fault, tmp_path):
    large = bytes(range(256)) * (33 << 12)  # 33 MiB, three parts
    (tmp_path / "large").write_bytes(large)
    for method, part in (("POST", "uploads"), ("PUT", "partNumber=2"), ("POST", "uploadId")):
        faults.faults[:] = [trouble := Fault(**PASSING[fault], method=method, part=part)]
        store.put("large", tmp_path / "large")
        assert trouble.times <= 0
        faults.faults[:] = [Fault(**PASSING[fault], method="GET", skip=1)]
        store.fetch("large", tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == large
        store.delete("large")


@pytest.mark.parametrize("what", ["put if absent", "put if unchanged"])
def test_an_answer_that_never_comes_is_not_waited_for(store, faults, what, monkeypatch, tmp_path):
    monkeypatch.setattr(storage, "_TIMEOUT", 0.2)
    store = Store.at(store.url)
    old = store.put("old", OLD)
    ask, answer, left = ASKED[what]
    held_back = threading.Event()
    faults.faults[:] = [Fault(method="PUT", wait=held_back)]
    try:
        assert ask(store, old, tmp_path) == answer
    finally:
        held_back.set()
    assert {key: store.read(key) for key in store.list()} == left


def test_a_write_of_another_is_not_taken_for_ours(store, faults):
    """Our first attempt never arrived; meanwhile somebody else wrote."""
    old = store.put("old", OLD)
    store.put("new", b"theirs")
    store.put("old", b"theirs")
    for key, on in (("new", {"if_absent": True}), ("old", {"if_version": old.version})):
        faults.faults[:] = [Fault(method="PUT", refused=True)]
        with pytest.raises(Conflict):
            store.put(key, b"ours", **on)
        assert store.read(key) == b"theirs"


def test_an_object_that_changes_while_it_is_fetched_is_fetched_again(store, faults, tmp_path):
    store.put("x", OLD)
    faults.faults[:] = [Fault(method="GET", wait=(changed := threading.Event()))]
    fetching = threading.Thread(target=store.fetch, args=("x", tmp_path / "file"))
    fetching.start()
    store.put("x", NEW)
    changed.set()
    fetching.join()
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [NEW]


def test_a_list_that_is_late_changes_no_condition(store, faults):
    store.put("x", OLD)
    store.list()
    store.put("y", NEW)
    faults.faults[:] = [Fault(part="list-type=2", stale=True)]
    assert list(store.list()) == ["x"]  # as the server says; a store does not
    with pytest.raises(Conflict):
        store.put("y", OLD, if_absent=True)
    assert list(store.list()) == ["x", "y"]


FINAL = {
    "403": ({"status": 403}, "cannot write this. These credentials may not .* on 'bucket"),
    "401": ({"status": 401}, "There are no valid credentials. (Run `gcloud|Set AWS_ACCESS)"),
    "503 for ever": ({"status": 503}, "not reachable, or too busy, for 0 s. Start again"),
    "refused for ever": ({"refused": True}, "not reachable, or too busy, for 0 s. Start again"),
    "400": ({"status": 400}, "The store refuses the request. The answer was: .*400"),
}


@pytest.mark.parametrize("fault", FINAL)
@pytest.mark.parametrize("on", [{}, {"if_absent": True}])
def test_a_fault_that_stays_is_told(store, faults, fault, monkeypatch, on):
    monkeypatch.setattr(storage, "LIMIT", 0.05)
    store = Store.at(store.url)
    wrong, says = FINAL[fault]
    faults.faults[:] = [Fault(**wrong, times=1000)]
    with pytest.raises(StorageError, match=f"^{store.url}/x: .*{says}"):
        store.put("x", b"", **on)


def test_a_bucket_that_is_not_there_is_named(store):
    store = Store.at(f"{store.url[:5]}nosuchbucket/run")
    asks = [lambda: store.put("x", b""), lambda: store.put("x", b"", if_absent=True)]
    if store.url.startswith("s3"):  # fake-gcs-server does not tell what is missing: the bucket
        asks += [lambda: store.read("x"), lambda: store.list()]
    for ask in asks:
        with pytest.raises(StorageError, match="There is no bucket 'nosuchbucket'. Make it, or"):
            ask()


@pytest.mark.parametrize("url", ["gs://", "http://host/x", "s3:///x", "bucket/x", "gs://b/x?y=1"])
def test_what_is_no_place_in_a_bucket_is_refused(url):
    with pytest.raises(StorageError, match="expected gs://BUCKET/FOLDER"):
        Store.at(url)
