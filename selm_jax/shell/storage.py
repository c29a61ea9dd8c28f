"""Objects in a bucket (`gs://`, `s3://`): each is written whole or not at all, under conditions.

A run on many hosts needs no more than this: to put an object, alone or on the condition that there
is none yet or that nobody has changed it since; to read one, or a range of it; to list, and to
delete. Google's and Amazon's stores promise that whoever reads or lists after a write sees it.

Requests that fail for a passing reason (429, 5xx, a connection that is cut) are sent again for
`LIMIT` seconds. If the answer to a write was lost, the store refuses the second attempt although
the first one succeeded. So a refused write whose bytes are stored counts as done.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from selm_jax.shell.storage_backend import (
    StorageError,
    failure,
    no_bucket,
    obstore,
    opened,
    passes,
)

LIMIT = 120.0  # seconds for which a request that failed is sent again
_TIMEOUT = 60.0  # seconds for one request; none moves more than _PART bytes
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 15.0  # seconds between two tries
_PART = 8 << 20  # bytes; larger files are sent and fetched in parts
_MOST_PARTS = 9_000  # S3 takes 10,000
_AT_ONCE = 8  # parts of one file in flight
# However many threads ask: so that a line of 20 Mbit/s moves what is in flight before its timeout.
_sending, _fetching = threading.Semaphore(2), threading.Semaphore(2 * _AT_ONCE)

T = TypeVar("T")


class Conflict(RuntimeError):
    """A conditional write found another object than it expected, and wrote nothing."""


@dataclass(frozen=True)
class Entry:
    """An object in a store.

    Attributes:
      key: its name, without the store's prefix.
      size: in bytes.
      version: the store's ETag. It differs if the content differs; S3 gives equal contents the
        same.
      modified: when it was written, by the store's clock.
    """

    key: str
    size: int
    version: str
    modified: datetime


def is_url(name: str | Path) -> bool:
    """Says whether a name is the url of something in a bucket; the last two kinds are for tests."""
    return str(name).startswith(("gs://", "s3://", "file://", "memory://"))


class Store:
    """A bucket, or the part of it under a prefix. Threads may share one.

    Attributes:
      url: such as `gs://bucket/prefix`, without a slash at the end.
      before_writing: called before anything is written or deleted; it may refuse by an exception.
    """

    def __init__(self, url: str, inner: Any):
        self.url = url
        self.before_writing: Callable[[], None] = lambda: None
        self._inner = inner
        self._scheme = urlsplit(url).scheme

    @classmethod
    def at(cls, url: str) -> Store:
        """Opens `gs://bucket/prefix` or `s3://bucket/prefix`, without sending a request.

        Credentials and the addresses of emulators come from the environment (docs/run.md).
        `file:///folder` and `memory://name` are for tests; the latter lives in this process. A
        process that is killed while it writes leaves a file `NAME#1` in such a folder. That is no
        object: this class does not list it, nor does it stand in the way of another write.

        Raises:
          StorageError: the url is not one of these, or obstore is not installed.
        """
        url = url.rstrip("/")
        waits = (_FIRST_WAIT, _LONGEST_WAIT)
        return cls(url, opened(url, limit=LIMIT, timeout=_TIMEOUT, waits=waits))

    def put(
        self,
        key: str,
        source: bytes | Path,
        *,
        if_absent: bool = False,
        if_version: str | None = None,
    ) -> Entry:
        """Writes an object whole, or not at all; one of more than 8 MiB in parts.

        Args:
          if_absent: write only if there is no such object.
          if_version: write only if the object has this version. A conditional write has its
            content in memory.

        Raises:
          Conflict: the condition does not hold, and other bytes than these are stored. Equal
            bytes count as written: where it matters who wrote them, they must say so.
        """
        self.before_writing()
        if if_absent or if_version is not None:
            content = source if isinstance(source, bytes) else source.read_bytes()
            return self._put_if(key, content, if_version)
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        part = max(_PART, -(-size // _MOST_PARTS))

        def send(ob: Any) -> Any:
            many = {"use_multipart": size > part, "chunk_size": part, "max_concurrency": _AT_ONCE}
            with _sending if size > part else contextlib.nullcontext():
                return ob.put(self._inner, key, source, **many)

        return self._written(key, size, self._ask("write", key, send))

    def read(self, key: str) -> bytes:
        """The bytes of an object. Raises FileNotFoundError if there is none."""
        return self._ask("read", key, lambda ob: bytes(ob.get(self._inner, key).bytes()))

    def read_range(self, key: str, start: int, stop: int, *, version: str | None = None) -> bytes:
        """The bytes from `start` up to, not including, `stop`; several parts at a time.

        Raises:
          FileNotFoundError: there is no such object.
          Conflict: the object is too short, or has not the `version` that it should have.
        """
        starts = range(start, stop, _PART)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            parts = [*pool.map(lambda at: self._part(key, at, min(at + _PART, stop)), starts)]
        content = b"".join(part for part, _ in parts)
        versions = {found for _, found in parts} | ({version} if version else set())
        if len(content) != stop - start or len(versions) > 1:
            raise Conflict(f"{self.url}/{key} is shorter than it was, or was changed by another")
        return content

    def fetch(self, key: str, target: Path) -> Entry:
        """Copies an object into a file, which is there whole or not at all.

        Raises:
          FileNotFoundError: there is no such object.
        """
        partial = target.with_name(f"{target.name}.{os.getpid()}.selm-partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            while (entry := self._copied(key, partial)) is None:
                pass  # somebody replaced the object in the middle
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)
        return entry

    def head(self, key: str) -> Entry | None:
        """Returns what is known of an object without reading it; None if there is no object."""
        try:
            return self._entry(self._ask("look at", key, lambda ob: ob.head(self._inner, key)))
        except FileNotFoundError:
            return None

    def list(self, prefix: str = "") -> dict[str, Entry]:
        """The objects of the store, or of a folder in it, by key, in order."""

        def ask(ob: Any) -> list[Any]:
            pages = ob.list(self._inner, prefix=prefix.rstrip("/") or None)
            return [self._entry(each) for page in pages for each in page]

        return {each.key: each for each in sorted(self._ask("list", prefix, ask), key=_key)}

    def delete(self, key: str) -> None:
        """Deletes an object, if there is one."""
        self.before_writing()
        with contextlib.suppress(FileNotFoundError):
            self._ask("delete", key, lambda ob: ob.delete(self._inner, key))

    def _put_if(self, key: str, content: bytes, version: str | None) -> Entry:
        """Writes if there is no object yet or, with a `version`, if the object has it still."""
        exceptions = obstore().exceptions
        refused = (exceptions.AlreadyExistsError, exceptions.PreconditionError, FileNotFoundError)
        while True:
            with self._alone():
                mode = "create" if version is None else self._update(key, version)
                if mode is not None:
                    with contextlib.suppress(*refused):
                        done = self._ask(
                            "write",
                            key,
                            lambda ob, mode=mode: ob.put(self._inner, key, content, mode=mode),
                        )
                        return self._written(key, len(content), done)
            found = self.head(key)
            if found is None and version is None:
                # S3 also refuses while another write is under way, which failed in the end.
                time.sleep(random.uniform(0, _FIRST_WAIT))
                continue
            if found is not None and found.size == len(content) and self.read(key) == content:
                return found
            raise Conflict(
                f"{self.url}/{key}: "
                + ("exists already" if version is None else "was changed or deleted by another")
            )

    def _update(self, key: str, version: str) -> Any:
        """The mode of a write onto this version; None if the object has another one now."""
        if self._scheme == "s3":
            return {"e_tag": f'"{version}"'}
        try:
            now = self._ask("look at", key, lambda ob: ob.head(self._inner, key))
        except FileNotFoundError:
            return None
        if _version(now) != version:
            return None
        if self._scheme == "file":  # nobody else is here, because of `_alone`
            return "overwrite"
        # Google's store compares the generation, of which lists say nothing.
        return {name: now[name] for name in ("e_tag", "version") if now[name] is not None}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keeps other conditional writes out, where the store cannot: in a local folder."""
        if self._scheme != "file":
            yield
            return
        folder = os.open(unquote(urlsplit(self.url).path), os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)
            yield
        finally:
            os.close(folder)

    def _written(self, key: str, size: int, put: Any) -> Entry:
        """The entry of an object that was just written: the answer to a write lacks its time."""
        now = self.head(key)
        if now is None:
            raise StorageError(
                f"{self.url}/{key} was deleted by another right after it was written"
            )
        return Entry(key, size, _version(put), now.modified)

    def _copied(self, key: str, target: Path) -> Entry | None:
        """Copies an object part by part; None if another version turned up in the middle."""
        entry = self.head(key)
        if entry is None:
            raise FileNotFoundError(f"{self.url}/{key}")
        starts = range(0, entry.size, _PART)

        def copy(start: int) -> bool:
            stop = min(start + _PART, entry.size)
            content, version = self._part(key, start, stop)
            if version != entry.version or len(content) != stop - start:
                return False
            return os.pwrite(file.fileno(), content, start) == len(content)

        with target.open("wb") as file, ThreadPoolExecutor(_AT_ONCE) as pool:
            whole = all(pool.map(copy, starts))
            file.flush()
            os.fsync(file.fileno())
        return entry if whole else None

    def _part(self, key: str, start: int, stop: int) -> tuple[bytes, str]:
        """The bytes of a range, fewer if the object ends before, and the object's version."""

        def ask(ob: Any) -> tuple[bytes, str]:
            with _fetching:
                got = ob.get(self._inner, key, options={"range": (start, stop)})
                return bytes(got.bytes()), _version(got.meta)

        return self._ask("read", key, ask)

    def _entry(self, meta: Any) -> Entry:
        return Entry(meta["path"], meta["size"], _version(meta), meta["last_modified"])

    def _ask(self, what: str, key: str, request: Callable[[Any], T]) -> T:
        """Sends a request until it is answered, for `LIMIT` seconds at most."""
        ob = obstore()
        until = time.monotonic() + LIMIT
        wait = _FIRST_WAIT
        while True:
            try:
                return request(ob)
            except (ob.exceptions.AlreadyExistsError, ob.exceptions.PreconditionError):
                raise
            except (FileNotFoundError, ob.exceptions.BaseError) as e:
                if not passes(e) or time.monotonic() + wait > until:
                    if isinstance(e, FileNotFoundError) and not no_bucket(what, e):
                        raise FileNotFoundError(f"{self.url}/{key}") from None
                    raise failure(self.url, what, key, e, LIMIT) from None
            time.sleep(random.uniform(wait / 2, wait))
            wait = min(2 * wait, _LONGEST_WAIT)


def _key(entry: Entry) -> str:
    return entry.key


def _version(meta: Any) -> str:
    return (meta["e_tag"] or meta["version"] or "").strip('"')
