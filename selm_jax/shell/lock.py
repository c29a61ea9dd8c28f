"""One run at a time in a run folder, also where hosts share it, and never held by the dead.

The name of a file says who holds the lock: `.lock.ID` is held by ID, a name that is never given again;
`.lock` is free. Whoever takes a lock, free or of the dead, renames that file away. A rename is one atomic
operation of the file system, of NFS too, and of several that name the same source one alone succeeds: for
the others the source is gone. So of all who find a dead holder one succeeds it, and a late one cannot take
the lock of the successor for that of the dead, whose name it still has in mind.

A holder is alive if it has locked its file (flock: the system lets go of it when the process dies, however
it dies), which counts on its own machine alone, since not every network file system tells other hosts; or,
for other machines, if it renews the file's time. What nobody renews for `LEASE` seconds is over, and who was
suspended for so long ends when it finds its name gone.

Where no lock is to be seen, several may make one. Therefore who has put its name there looks whether
another stands beside it, and if so takes its own back: of two that put first and look then, at least one
sees the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import random
import re
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from selm_jax.shell import jsonl
from selm_jax.shell.artifacts import ArtifactError
from selm_jax.shell.paths import claim

RENEW = 10.0  # seconds between renewals
LEASE = 60.0  # seconds without a renewal, after which a holder is taken for dead

_FREE = ".lock"
_NEW, _OLD = ".lock-new", ".lock-old"
_HELD = re.compile(r"\.lock\.[0-9a-f]{32}")


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds a run folder for this process and its run.

    The lease of another host that does not renew it is waited for, up to `LEASE` seconds: a machine
    that replaces a preempted one goes on by itself.

    Raises:
      ArtifactError: another process is at work there; the message says which. Or a lock there is damaged,
        or not this program's.
      PathError: the folder has something in it that this program did not make.
    """
    claim(folder)
    while (held := _take(folder)) is None:
        time.sleep(random.uniform(0, 0.05))  # others are at it too: not in step with them
    file, handle = held
    with handle:
        ended = threading.Event()
        renewing = threading.Thread(target=_renew, args=(file, ended), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            ended.set()
            renewing.join()
            if file.exists():
                (folder / _FREE).touch()
                file.unlink(missing_ok=True)


def _take(folder: Path) -> tuple[Path, IO[str]] | None:
    """Our own file, held and open; None if somebody else was quicker.

    Raises:
      ArtifactError: another process has the lock.
    """
    held = _held(folder)
    source = held[0] if held else folder / _FREE
    if not held:
        with contextlib.suppress(FileExistsError):
            source.open("x").close()
    try:
        holder = _read(source)
        if holder or held:
            _check_that_it_is_over(folder, source, holder)
    except FileNotFoundError:
        return None
    ours = {"machine": _machine(), "host": socket.gethostname(), "process": os.getpid()}
    ours["id"] = uuid.uuid4().hex
    fresh, gone, mine = (folder / f"{name}.{ours['id']}" for name in (_NEW, _OLD, _FREE))
    handle = fresh.open("w", encoding="utf-8")
    try:
        json.dump(ours, handle)
        handle.flush()
        os.fsync(handle.fileno())
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if _rename(source, gone) and _rename(fresh, mine):
            if _held(folder) == [mine]:
                _tidy(folder, mine)
                return mine, handle
            mine.unlink(missing_ok=True)
    except BaseException:
        handle.close()
        mine.unlink(missing_ok=True)
        raise
    finally:
        fresh.unlink(missing_ok=True)
        gone.unlink(missing_ok=True)
    handle.close()
    return None


def _held(folder: Path) -> list[Path]:
    """The locks that somebody holds: one, but for a moment while several make the first."""
    return sorted(file for file in folder.iterdir() if _HELD.fullmatch(file.name))


def _rename(source: Path, target: Path) -> bool:
    """Whether `source` was there and has become `target`, a name of our own."""
    try:
        os.rename(source, target)
    except FileNotFoundError:
        # A file server that is asked twice, because its answer was lost, denies what it has done.
        return target.exists()
    return True


def _tidy(folder: Path, mine: Path) -> None:
    """Removes what processes that were killed while they took a lock have left."""
    for file in (*folder.glob(f"{_NEW}.*"), *folder.glob(f"{_OLD}.*")):
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime < mine.stat().st_mtime - LEASE:
                file.unlink()


def _check_that_it_is_over(folder: Path, file: Path, holder: dict[str, Any]) -> None:
    """Returns when the holder of a lock is dead; raises ArtifactError if it lives."""
    if holder.get("machine") != _machine():
        _wait_for_its_end(folder, file, holder)
        return
    with file.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # the system knows that it lives
            raise _refusal(folder, holder) from None


def _machine() -> str:
    """Names the running system: the same in its containers, another after it has been restarted."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def _refusal(folder: Path, holder: dict[str, Any]) -> ArtifactError:
    who = f" (process {holder['process']} on {holder['host']})" if holder else ""
    return ArtifactError(
        f"{folder}: another process{who} is at work in this run folder. Wait for it, stop it, or "
        "give this run another `output`"
    )


def _wait_for_its_end(folder: Path, file: Path, holder: dict[str, Any]) -> None:
    """Returns when the lease of another host is over.

    Raises:
      ArtifactError: it is renewed.
      FileNotFoundError: the lock has become another's.
    """
    renewed = _renewed(file)
    # Ages by this host's own clock from now on: those of two hosts may differ.
    until = time.monotonic() + LEASE
    print(
        f"{folder}: process {holder.get('process')} on {holder.get('host')} was at work here; "
        f"waiting up to {LEASE:.0f} s for a sign of life",
        file=sys.stderr,
    )
    while _renewed(file) == renewed:
        if time.monotonic() >= until:  # looked at once more, however long the last sleep was
            return
        time.sleep(min(1.0, LEASE / 10))
    raise _refusal(folder, _read(file))


def _renewed(file: Path) -> int:
    with file.open() as handle:  # opened: then a file server is asked, not what is remembered of it
        return os.fstat(handle.fileno()).st_mtime_ns


def _renew(file: Path, ended: threading.Event) -> None:
    """Renews the lease until `ended`; if it has become another's, ends this process at once."""
    while not ended.wait(RENEW):
        try:
            os.utime(file)
        except FileNotFoundError:
            print(
                f"selm: {file}: this process was silent for {LEASE:.0f} s and another one has "
                "taken over; it ends here, and nothing is lost",
                file=sys.stderr,
            )
            os._exit(1)
        except OSError:
            continue  # a file server that is away for a moment


def _read(file: Path) -> dict[str, Any]:
    """Who holds a lock; empty where nobody does.

    Raises:
      ArtifactError: the file does not say it in this program's words.
      FileNotFoundError: it has become another's.
    """
    try:
        text = file.read_text(encoding="utf-8")
        holder: Any = jsonl.value(text) if text else {}
    except ValueError:
        holder = None
    told = {"machine": str, "host": str, "process": int, "id": str}
    if holder != {} and not (
        isinstance(holder, dict) and all(isinstance(holder.get(k), v) for k, v in told.items())
    ):
        raise ArtifactError(
            f"{file}: is damaged, or not a lock of this program. If nothing is at work in this "
            "folder, delete the file and start again"
        )
    return holder
