"""One run at a time in a run folder, also where hosts share it, and never held by the dead.

Two things together. flock: the system lets go of it when the process dies, however it dies; but it
is not told of other hosts on every network file system, and a server may keep it for a host that is
gone. So the lock file is also a lease, which its holder renews. A lease that nobody renews is over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from selm_jax import jsonl
from selm_jax.artifacts import ArtifactError
from selm_jax.paths import claim

RENEW = 10.0  # seconds between renewals
LEASE = 60.0  # seconds without a renewal, after which a holder is taken for dead


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds a run folder for this process and its run.

    The lease of another host that does not renew it is waited for, up to `LEASE` seconds: a machine
    that replaces a preempted one goes on by itself.

    Raises:
      ArtifactError: another process is at work there; the message says which.
      PathError: the folder has something in it that this program did not make.
    """
    claim(folder)
    file = folder / ".lock"
    while True:
        handle = file.open("a+")
        holder = _read(file)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.close()
            if holder.get("machine") in (None, _machine()):  # the system knows that it lives
                raise _refusal(folder, holder) from None
        else:
            if not file.exists() or os.fstat(handle.fileno()).st_ino != file.stat().st_ino:
                handle.close()  # replaced while we took it
                continue
            if holder.get("machine") in (None, _machine()):  # nobody's, or of a dead process here
                break
            handle.close()
        _wait_for_its_end(folder, file, holder)
        _replace(file)
    ours = {"machine": _machine(), "host": socket.gethostname(), "process": os.getpid()}
    ours["id"] = uuid.uuid4().hex
    with handle:
        _write(handle, ours)
        ended = threading.Event()
        renewing = threading.Thread(target=_renew, args=(file, ours["id"], ended), daemon=True)
        renewing.start()
        try:
            yield
        finally:
            ended.set()
            renewing.join()
            if _holds(file, ours["id"]):
                _write(handle, {})


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
    """Returns when the lease of another host is over. Raises ArtifactError if it is renewed."""
    renewed = file.stat().st_mtime_ns
    # Ages by this host's own clock from now on: those of two hosts may differ.
    until = time.monotonic() + LEASE
    print(
        f"{folder}: process {holder.get('process')} on {holder.get('host')} was at work here; "
        f"waiting up to {LEASE:.0f} s for a sign of life",
        file=sys.stderr,
    )
    while file.exists():
        if file.stat().st_mtime_ns != renewed:
            raise _refusal(folder, _read(file))
        if time.monotonic() >= until:  # looked at once more, however long the last sleep was
            return
        time.sleep(min(1.0, LEASE / 10))


def _replace(file: Path) -> None:
    """Puts a new file there, of which no system has a lock: a server may keep one for the dead."""
    fresh = file.with_name(f"{file.name}.{uuid.uuid4().hex}")
    fresh.touch()
    os.replace(fresh, file)


def _renew(file: Path, ours: str, ended: threading.Event) -> None:
    """Renews the lease until `ended`; if it has become another's, ends this process at once."""
    while not ended.wait(RENEW):
        try:
            if not _holds(file, ours):
                print(
                    f"selm: {file}: this process was silent for {LEASE:.0f} s and another one has "
                    "taken over; it ends here, and nothing is lost",
                    file=sys.stderr,
                )
                os._exit(1)
            os.utime(file)
        except OSError:
            continue  # a file server that is away for a moment


def _holds(file: Path, ours: str) -> bool:
    try:
        return _read(file).get("id") == ours
    except ArtifactError:
        return False


def _read(file: Path) -> dict[str, Any]:
    """Who holds the folder; empty where nobody does.

    Raises:
      ArtifactError: the file does not say it in this program's words.
    """
    try:
        text = file.read_text(encoding="utf-8")
        holder = jsonl.value(text) if text else {}
    except FileNotFoundError:
        return {}
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


def _write(handle, value: dict[str, Any]) -> None:
    handle.seek(0)
    handle.truncate()
    handle.write(json.dumps(value) if value else "")
    handle.flush()
    os.fsync(handle.fileno())
