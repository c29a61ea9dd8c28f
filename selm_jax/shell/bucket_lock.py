"""A lease on a run folder in a bucket, for one process of all hosts; it expires when that one dies.

The object `.lock` says who holds the lease; empty, it is free. Every write to it is conditional: it
succeeds only if nobody has written since we looked. So of several processes that take a free or an
expired lease exactly one succeeds, and a holder whose lease was taken cannot renew it.

A holder renews its lease every `RENEW` seconds, and each renewal changes the object. Whoever sees
no change for `LEASE` seconds of its own steady clock knows that the holder is dead or suspended:
no clocks of two hosts are compared, and they may differ by any amount. A process that was suspended
ends itself when its next renewal is refused; before it writes anything else, it renews a lease that
has become old. On the holder's own machine, a dead process is noticed at once.

The other processes of the holder's run watch the lease (`followed`): they may live on for a while
after the holder has died.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from selm_jax.shell.artifacts import ArtifactError
from selm_jax.shell.lock import LEASE, RENEW, holder_in, refusal
from selm_jax.shell.storage import Conflict, Entry, StorageError, Store

KEY = ".lock"
_CLOCK = ".lock-clock"  # an object that is written in order to learn the store's time


@contextlib.contextmanager
def held(store: Store) -> Iterator[str]:
    """Locks a run folder in a bucket for this process while the body runs; yields the lease's id.

    If another host holds the lease, this waits up to `LEASE` seconds for it to expire, so that a
    machine that replaces a preempted one continues without help. If this process loses the lease,
    because it was suspended, it ends, and `store` writes nothing before.

    Raises:
      ArtifactError: another process is using the folder (the message says which), or the lock is
        damaged or belongs to another program.
      StorageError: the bucket cannot be used.
    """
    while (lease := _take(Store.at(store.url))) is None:
        time.sleep(random.uniform(0, 0.05))  # at random: others may retry at the same time
    ended = threading.Event()
    renewing = threading.Thread(target=_renew, args=(lease, ended), daemon=True)
    renewing.start()
    store.before_writing = lambda: lease.renew(LEASE / 2)
    try:
        yield lease.about["id"]
    finally:
        store.before_writing = lambda: None
        ended.set()
        renewing.join()
        with contextlib.suppress(StorageError):  # then it expires
            lease.write(b"")


@contextlib.contextmanager
def followed(store: Store, lease: str) -> Iterator[None]:
    """Lets this process write while the first process of its run holds the lease with this id.

    If the lease was last renewed half of its time ago, a write waits for the next renewal. If
    another process has taken the lease, this process ends.
    """
    follower, ended = _Follower(Store.at(store.url), lease), threading.Event()
    looking = threading.Thread(target=_follow, args=(follower, ended), daemon=True)
    looking.start()
    store.before_writing = follower.wait
    try:
        yield
    finally:
        store.before_writing = lambda: None
        follower.over = True
        ended.set()
        looking.join()


def holder(store: Store) -> dict[str, Any] | None:
    """The `process` and `host` that use a run folder in a bucket; None if no process does.

    A process of another machine counts as long as it renews its lease.
    """
    entry, found = _look(store)
    if entry is None or not found:
        return None
    if found["machine"] == _machine():
        return found if _lives(found) else None
    # Without the right to write there is no telling what time it is at the store.
    with contextlib.suppress(StorageError):
        now = store.put(_CLOCK, b"").modified
        if (now - entry.modified).total_seconds() >= LEASE:
            return None
    return found


class _Lease:
    """A lease that this process holds.

    Attributes:
      store: a handle of its own on the folder, whose writes do not wait for the lease.
      about: what the lock says of this process.
      version: of the lock, as we wrote it last.
      renewed: when we last began to write it, by `_now`.
    """

    def __init__(self, store: Store, about: dict[str, Any], version: str, renewed: float):
        self.store, self.about, self.version, self.renewed = store, about, version, renewed
        self._one = threading.Lock()

    def renew(self, age: float = 0.0) -> None:
        """Renews a lease of this age, in seconds; ends this process if another has taken it.

        Raises:
          StorageError: the store cannot be reached.
        """
        if (began := _now()) - self.renewed < age:
            return
        with self._one:
            if not self.write(_content(self.about)):
                _end(self.store, "this process")
            self.renewed = began

    def write(self, content: bytes) -> bool:
        """Writes into the lock if it is still ours; whether it is."""
        while True:
            try:
                self.version = self.store.put(KEY, content, if_version=self.version).version
                return True
            except Conflict:
                entry, found = _look(self.store)
                if entry is None or found.get("id") != self.about["id"]:
                    return False
                # An earlier write of ours had succeeded, although no answer came.
                self.version = entry.version


class _Follower:
    """Holds what a process knows of a lease that the first process of its run has.

    Attributes:
      store: a handle of its own on the folder, whose reads wait for nothing.
      lease: the lease's id.
      version: of the lock, as seen last.
      looked: when we last began to look, by `_now`.
      renewed: the lease was certainly renewed after this time.
      over: whether the lease was given back, or this process needs it no more.
    """

    def __init__(self, store: Store, lease: str):
        self.store, self.lease = store, lease
        self.version: str | None = None
        self.looked = self.renewed = -float("inf")
        self.over = False

    def look(self) -> None:
        """Looks whether the lease was renewed; ends this process if another run has taken it.

        Raises:
          StorageError: the store cannot be reached.
          ArtifactError: the lock is damaged.
        """
        began = _now()
        entry, found = _look(self.store)
        if not found:
            self.over = True
        elif found["id"] != self.lease:
            _end(self.store, "the first process of this run")
        elif entry is not None and entry.version != self.version:
            self.version, self.renewed = entry.version, self.looked  # it had another one then
        self.looked = began

    def wait(self) -> None:
        """Waits until the lease is young enough to write.

        Raises:
          StorageError: it was given back, or not renewed for much longer than it lasts.
        """
        until = _now() + 5 * LEASE  # sooner, jax ends the processes of a run whose first one died
        while self.over or _now() - self.renewed > LEASE / 2:
            if self.over or _now() > until:
                raise StorageError(
                    f"{self.store.url}: the first process of this run does not hold this folder "
                    "any more, so this process writes nothing. Start all processes again"
                )
            time.sleep(RENEW / 10)


def _end(store: Store, who: str) -> NoReturn:
    """Ends this process, because another run has taken the lease."""
    print(
        f"selm: {store.url}: {who} did not respond for {LEASE:.0f} s and another one has taken "
        "over. This one stops; nothing is lost",
        file=sys.stderr,
    )
    sys.stderr.flush()
    os._exit(1)


def _take(store: Store) -> _Lease | None:
    """Tries to take the lease. Returns None if another process was faster.

    Raises:
      ArtifactError: another process holds the lease.
    """
    entry, found = _look(store)
    if entry is not None and found:
        _check_that_it_is_over(store, entry, found)
    about = {"machine": _machine(), "host": socket.gethostname(), "process": os.getpid()}
    about |= {"started": _started(os.getpid()), "id": uuid.uuid4().hex}
    version = None if entry is None else entry.version
    began = _now()
    try:
        ours = store.put(KEY, _content(about), if_absent=entry is None, if_version=version)
        return _Lease(store, about, ours.version, began)
    except Conflict:
        return None


def _renew(lease: _Lease, ended: threading.Event) -> None:
    """Renews a lease until `ended` is set."""
    while not ended.wait(RENEW):
        with contextlib.suppress(StorageError):  # it may be out of reach for a while, for all
            lease.renew()


def _follow(follower: _Follower, ended: threading.Event) -> None:
    """Looks at a lease until `ended` is set, twice as often as it is renewed."""
    while not ended.is_set():
        with contextlib.suppress(StorageError, ArtifactError):  # then writes wait
            follower.look()
        ended.wait(RENEW / 2)


def _now() -> float:
    """Seconds of a steady clock that also runs while this machine is suspended, where it can.

    A lease goes on to age then, and Linux's monotonic clock stands still.
    """
    clock = getattr(time, "CLOCK_BOOTTIME", None)  # only Linux has it
    return time.monotonic() if clock is None else time.clock_gettime(clock)


def _content(about: dict[str, Any]) -> bytes:
    """Makes what a holder writes: never the same twice, as equal contents may share a version."""
    return json.dumps(about | {"renewal": uuid.uuid4().hex}).encode()


def _look(store: Store) -> tuple[Entry | None, dict[str, Any]]:
    """The lock, and what it says of its holder: {} if it is free.

    Raises:
      ArtifactError: the lock is damaged or not one of this program.
    """
    while (entry := store.head(KEY)) is not None:
        try:
            content = store.read(KEY)
        except FileNotFoundError:
            return None, {}
        if (after := store.head(KEY)) is not None and after.version == entry.version:
            return entry, holder_in(content, f"{store.url}/{KEY}", "object", started=int)
    return None, {}


def _check_that_it_is_over(store: Store, entry: Entry, found: dict[str, Any]) -> None:
    """Returns if the process that holds a lease is dead, or its lease was taken meanwhile.

    Raises:
      ArtifactError: the process is alive.
    """
    if found["machine"] == _machine():
        if _lives(found):
            raise refusal(store.url, found)
        return
    print(
        f"{store.url}: in use by process {found['process']} on {found['host']}; waiting up to "
        f"{LEASE:.0f} s to see whether it is still running",
        file=sys.stderr,
    )
    since = time.monotonic()
    while time.monotonic() - since < LEASE:
        time.sleep(min(1.0, LEASE / 10))
        asked = time.monotonic()
        now = store.head(KEY)
        if now is None or now.version != entry.version:
            _, found = _look(store)
            if now is None or not found:
                return
            raise refusal(store.url, found)
        if time.monotonic() - asked > RENEW:
            since = time.monotonic()  # the store was out of reach, perhaps for the holder too


def _machine() -> str:
    """An ID of the running system and its process numbers: another one in each container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {uuid.uuid4().hex}"  # equal to none: `_lives` needs /proc


def _lives(found: dict[str, Any]) -> bool:
    """Returns whether the holder, a process of this machine, is still running."""
    return found["started"] != 0 and _started(found["process"]) == found["started"]


def _started(process: int) -> int:
    """When a process started, in ticks since the machine did; 0 if it does not run (any more)."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
    except OSError:
        return 0
    state, *fields = text.rpartition(")")[2].split()  # after the name, which may be anything
    return 0 if state in "ZX" else int(fields[18])
