"""A lock on a run folder that also works across hosts and is released when its holder dies.

The lock is a file whose name says who holds it: `.lock.ID` is held by the process that chose the
random ID, which is never used again; `.lock` is free. A process takes a lock, be it free or of a
dead holder, by renaming that file away. A rename is atomic, on NFS too: if several processes rename
the same source, one succeeds and the others find that the source is gone. So a dead holder has
exactly one successor, and a slow process cannot mistake the successor's lock for the dead holder's,
because the names differ.

On its own machine, a holder is alive if it has an flock on its file, which the system releases
however the process dies. Not every network file system shows an flock to other hosts; for them, a
holder is alive if it renews the file's modification time. A lock that was not renewed for `LEASE`
seconds has expired. A process that was suspended for that long ends itself when it finds that its
file is gone.

If there is no lock file at all, several processes may create one at the same time. Therefore each
checks, after creating its own, whether there is another one, and withdraws if so: if all create
first and check afterwards, at most one of them sees only its own.
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
LEASE = 60.0  # seconds without a renewal after which a holder counts as dead

_FREE = ".lock"
_NEW, _OLD = ".lock-new", ".lock-old"
_HELD = re.compile(r"\.lock\.[0-9a-f]{32}")


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Locks a run folder for this process while the body runs.

    If another host holds the lock, this waits up to `LEASE` seconds for it to expire, so that a
    machine that replaces a preempted one continues without help.

    Raises:
      ArtifactError: another process is using the folder (the message says which), or a lock file
        there is damaged or belongs to another program.
      PathError: the folder contains something that this program did not make.
    """
    claim(folder)
    while (held := _take(folder)) is None:
        time.sleep(random.uniform(0, 0.05))  # at random: others may retry at the same time
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


def holder(folder: Path) -> dict[str, Any] | None:
    """The `process` and `host` that use a run folder; None if no process does.

    A process of another machine counts as long as it renews its lease.
    """
    for file in _held(folder):
        with contextlib.suppress(FileNotFoundError):
            found = _read(file)
            if found.get("machine") != _machine():
                return found if time.time() - file.stat().st_mtime < LEASE else None
            with file.open() as handle:
                try:
                    fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:  # its process still has the flock
                    return found
    return None


def _take(folder: Path) -> tuple[Path, IO[str]] | None:
    """Tries to take the lock. Returns our open lock file; None if another process was faster.

    Raises:
      ArtifactError: another process holds the lock.
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
    """The held lock files: at most one, except briefly while several processes create one."""
    return sorted(file for file in folder.iterdir() if _HELD.fullmatch(file.name))


def _rename(source: Path, target: Path) -> bool:
    """Renames `source` to `target`, which only this process uses. False without a `source`."""
    try:
        os.rename(source, target)
    except FileNotFoundError:
        # If a file server's answer was lost, the request is repeated, and then fails although the
        # first one succeeded.
        return target.exists()
    return True


def _tidy(folder: Path, mine: Path) -> None:
    """Removes temporary files of processes that were killed while they took a lock."""
    for file in (*folder.glob(f"{_NEW}.*"), *folder.glob(f"{_OLD}.*")):
        with contextlib.suppress(FileNotFoundError):
            if file.stat().st_mtime < mine.stat().st_mtime - LEASE:
                file.unlink()


def _check_that_it_is_over(folder: Path, file: Path, holder: dict[str, Any]) -> None:
    """Returns if the process that holds a lock is dead; raises ArtifactError if it is alive."""
    if holder.get("machine") != _machine():
        _wait_for_its_end(folder, file, holder)
        return
    with file.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:  # its process still has the flock
            raise refusal(folder, holder) from None


def _machine() -> str:
    """An ID of the running system: the same in all its containers, new after a reboot."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return boot.read_text().strip() if boot.exists() else socket.gethostname()


def refusal(folder: Path | str, holder: dict[str, Any]) -> ArtifactError:
    who = f" (process {holder['process']} on {holder['host']})" if holder else ""
    return ArtifactError(
        f"{folder}: another process{who} is using this run folder. Wait for it, stop it, or give "
        "this run another `output`"
    )


def _wait_for_its_end(folder: Path, file: Path, holder: dict[str, Any]) -> None:
    """Waits until a lock that a process on another host holds has expired.

    Raises:
      ArtifactError: the other host renews the lock.
      FileNotFoundError: another process has taken the lock.
    """
    renewed = _renewed(file)
    # Measured by this host's own clock, since the clocks of two hosts may differ.
    until = time.monotonic() + LEASE
    print(
        f"{folder}: in use by process {holder.get('process')} on {holder.get('host')}; waiting up "
        f"to {LEASE:.0f} s to see whether it is still running",
        file=sys.stderr,
    )
    while _renewed(file) == renewed:
        if time.monotonic() >= until:  # after one more look, however long the last sleep was
            return
        time.sleep(min(1.0, LEASE / 10))
    raise refusal(folder, _read(file))


def _renewed(file: Path) -> int:
    with file.open() as handle:  # opening a file bypasses NFS's cache of attributes
        return os.fstat(handle.fileno()).st_mtime_ns


def _renew(file: Path, ended: threading.Event) -> None:
    """Renews our lock until `ended` is set; ends this process if another process took the lock."""
    while not ended.wait(RENEW):
        try:
            os.utime(file)
        except FileNotFoundError:
            print(
                f"selm: {file}: this process did not respond for {LEASE:.0f} s and another one has "
                "taken over. This one stops; nothing is lost",
                file=sys.stderr,
            )
            os._exit(1)
        except OSError:
            continue  # a file server may be unreachable for a moment


def _read(file: Path) -> dict[str, Any]:
    """Reads which process holds a lock; {} if none does.

    Raises:
      ArtifactError: the file is damaged or not a lock of this program.
      FileNotFoundError: another process has taken the lock.
    """
    return holder_in(file.read_bytes(), str(file), "file")


def holder_in(content: bytes, where: str, kind: str, **more: type) -> dict[str, Any]:
    """Reads which process holds a lock from the lock's content; {} if none does.

    Args:
      where: the lock's path or URL, and `kind` what it is, for the error message.
      more: further keys that it must have, with their types.

    Raises:
      ArtifactError: the content is damaged or not a lock of this program.
    """
    try:
        holder: Any = jsonl.value(content.decode()) if content else {}
    except ValueError:
        holder = None
    told = {"machine": str, "host": str, "process": int, "id": str, **more}
    if holder != {} and not (
        isinstance(holder, dict) and all(isinstance(holder.get(k), v) for k, v in told.items())
    ):
        raise ArtifactError(
            f"{where} is damaged or is not a lock of this program. If no process is using this "
            f"folder, delete the {kind} and start again"
        )
    return holder
