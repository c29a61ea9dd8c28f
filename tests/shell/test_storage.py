"""A store in a bucket writes whole objects or none, under conditions, whatever goes wrong."""

from __future__ import annotations

import pytest

from selm_jax.shell.storage import Conflict, Store


@pytest.fixture
def store(bucket):
    return Store.at(f"{bucket}/runs/one")


def test_objects_are_written_read_listed_and_deleted(store, bucket, tmp_path):
    odd = "a b/c#?~%é+&=.txt"
    entry = store.put(odd, b"hello")
    assert store.head(odd) == entry == store.list()[odd]
    assert (entry.key, entry.size, store.read(odd)) == (odd, 5, b"hello")
    assert store.read_range(odd, 1, 4) == b"ell"
    store.put("a bc", b"")  # no object of the folder `a b`
    assert list(store.list("a b")) == list(store.list("a b/")) == [odd]
    assert list(store.list()) == sorted([odd, "a bc"])
    assert list(Store.at(f"{bucket}/runs").list()) == [f"one/{odd}", "one/a bc"]
    assert store.fetch(odd, tmp_path / "new" / "file").version == entry.version
    assert [each.read_bytes() for each in (tmp_path / "new").iterdir()] == [b"hello"]
    store.delete(odd)
    store.delete(odd)
    assert store.head(odd) is None and list(store.list()) == ["a bc"]
    for ask in (store.read, lambda key: store.read_range(key, 0, 1)):
        with pytest.raises(FileNotFoundError, match="runs/one/a b/c"):
            ask(odd)
    with pytest.raises(FileNotFoundError):
        store.fetch(odd, tmp_path / "gone")
    assert not (tmp_path / "gone").exists()


def test_a_large_file_goes_there_and_back_in_parts(store, tmp_path, faults):
    large = bytes(range(256)) * (36 << 12)  # 36 MiB
    (tmp_path / "large").write_bytes(large)
    entry = store.put("large", tmp_path / "large")
    assert entry.size == len(large) and store.head("large") == entry
    assert store.fetch("large", tmp_path / "back").version == entry.version
    assert (tmp_path / "back").read_bytes() == large
    assert sum("partNumber" in path for _, path in faults.asked) >= 3


def test_a_condition_that_does_not_hold_stops_a_write(store):
    first = store.put("x", b"1", if_absent=True)
    with pytest.raises(Conflict, match="x: exists already"):
        store.put("x", b"2", if_absent=True)
    second = store.put("x", b"22", if_version=first.version)
    assert store.head("x") == second
    with pytest.raises(Conflict, match="x: was changed or deleted"):
        store.put("x", b"3", if_version=first.version)
    with pytest.raises(Conflict):
        store.put("y", b"3", if_version=first.version)
    assert store.read("x") == b"22" and store.head("y") is None
    store.delete("x")
    with pytest.raises(Conflict):
        store.put("x", b"3", if_version=second.version)


def test_half_a_write_of_a_killed_process_is_no_object_of_a_folder(tmp_path):
    """It has a name such as `x#1`, which the store neither lists nor needs."""
    store = Store.at(f"file://{tmp_path}/bucket")
    first = store.put("a/x", b"1")
    for left in ("a/x#1", "a/x#2", "a/y#1"):
        (tmp_path / "bucket" / left).write_bytes(b"half")
    assert store.list() == {"a/x": first} and store.head("a/y") is None
    second = store.put("a/x", b"22", if_version=first.version)
    third = store.put("a/y", b"333", if_absent=True)
    assert store.list("a") == {"a/x": second, "a/y": third}
    store.delete("a/y")
    assert [store.read(key) for key in store.list()] == [b"22"]
