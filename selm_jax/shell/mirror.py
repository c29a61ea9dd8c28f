"""Keeps a local copy, a mirror, of a folder in a bucket: that of a run, or of a sweep.

The bucket is the truth. A process works in its mirror like in any folder, and
`selm_jax.shell.artifacts` puts every finished file into the bucket, in the order in which the files
are finished. So a killed run leaves in the bucket what it would leave on a disk, and what was not
put was never there: when a run begins, its mirror is made equal to the bucket.

Small files are fetched when the bucket is listed. Models and checkpoints are fetched when they are
read (`need`). A file next to the mirror records which version of each object the mirror has, and
its SHA-256; so a run that resumes on the same disk fetches and hashes only what has changed. The
SHA-256 of models are in the bucket, too (`.mirror/digests.json`), because a run that resumes on
another machine must know the digests of models that it does not read.

A process has one mirror per bucket folder, and a mirror belongs to one process at a time. `of`
finds the mirror that a path is in; nothing else is global. The runs of a sweep have mirrors of
their own: a folder below that has its own mark (`.selm`) is no part of the sweep's.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from selm_jax.shell.pace import here
from selm_jax.shell.paths import MARK, PathError, cache_root, place
from selm_jax.shell.sealed import sha256
from selm_jax.shell.storage import Entry, Store, is_url

SERVER_LOG = "server.log"  # of a run folder; it stays on the machine of the server that writes it
_DIGESTS = ".mirror/digests.json"
_OWN = re.compile(r"(.*/)?(\.mirror/|\.lock)")  # objects that are no files of a run
_LARGE = re.compile(r"(iteration_\d+/(model|adapter|checkpoints)|store)/")
_MODEL = re.compile(r"iteration_\d+/(model|adapter)/")
_AT_ONCE = 16  # requests
_URL = re.compile(r"(gs|s3)://[^/]+/.*[^/]|(file|memory)://.+")  # the latter two are for tests

_mirrors: dict[str, Mirror] = {}


@dataclass(frozen=True)
class _Copy:
    """Records what a local file was when it had the content of an object."""

    version: str
    size: int
    changed: int  # its time of modification, in nanoseconds
    sha256: str


class Mirror:
    """The local copy of a folder in a bucket.

    Attributes:
      url: the folder in the bucket.
      folder: the local copy. `FOLDER.jsonl` next to it records what it contains.
      there: the objects by key, as of the last listing and of this process's own changes.
    """

    def __init__(self, url: str, store: Store, folder: Path, lock: IO[str] | None = None):
        self.url, self.store, self.folder = url, store, folder
        self._flock = lock  # open, and so locked, as long as this mirror lives
        self.there: dict[str, Entry] = {}
        self._record = folder.with_name(f"{folder.name}.jsonl")
        self._copies = _read(self._record)
        self._digests: dict[str, list[str]] = {}  # of models' files: [version, SHA-256]
        self._lock = threading.Lock()

    def key(self, path: Path) -> str:
        return "" if path == self.folder else path.relative_to(self.folder).as_posix()

    def below(self, path: Path) -> list[str]:
        """The keys of the objects at or below a path."""
        key = self.key(path)
        return sorted(k for k in self.there if k == key or _is_in(k, key))

    def objects(self) -> dict[str, Entry]:
        """Lists the bucket's folder: the files of its run or sweep, without a sweep's runs."""
        found = self.everything()
        runs = tuple(key.removesuffix(MARK) for key in found if key.endswith(f"/{MARK}"))
        return {key: entry for key, entry in found.items() if not key.startswith(runs)}

    def everything(self) -> dict[str, Entry]:
        """Lists the bucket's folder, with the files of runs below it."""
        return {key: entry for key, entry in self.store.list().items() if not _OWN.match(key)}

    # From the bucket

    def refresh(self, path: Path | None = None) -> None:
        """Makes the files at or below a path equal to the bucket; large ones are only listed."""
        path = path or self.folder
        found = self.objects() if path == self.folder else self._listed(path)
        for file in [path] if path.is_file() else list(path.rglob("*")):
            key = self.key(file)
            if file.is_file() and key != SERVER_LOG and not self._is_here(key, found.get(key)):
                file.unlink()
        _remove_empty(path)
        for old in self.below(path):
            del self.there[old]
        self.there |= found
        if any(_MODEL.match(key) for key in found):
            self._digests = self._read_digests()
        self._fetch(key for key in found if not _LARGE.match(key))

    def need(self, path: Path, names: Iterable[str] | None = None) -> None:
        """Fetches the files at or below a path that are not here yet; if given, these names only.

        Args:
          names: of files, relative to the path.
        """
        below, key = self.below(path), self.key(path)
        wanted = below if names is None else {f"{key}/{name}" for name in names}
        self._fetch(each for each in below if each in wanted)

    def _listed(self, path: Path) -> dict[str, Entry]:
        """The objects at or below a path, also those that other processes have put."""
        key = self.key(path)
        one = self.store.head(key)
        return self.store.list(key) | ({} if one is None else {key: one})

    def _is_here(self, key: str, entry: Entry | None) -> bool:
        copy = self._copies.get(key)
        return bool(entry and copy and copy.version == entry.version) and self.fits(key)

    def fits(self, key: str) -> bool:
        """Returns whether the local file is as it was put or fetched."""
        copy, file = self._copies.get(key), self.folder / key
        if copy is None or not file.is_file():
            return False
        stat = file.stat()
        return (copy.size, copy.changed) == (stat.st_size, stat.st_mtime_ns)

    def _fetch(self, keys: Iterable[str]) -> None:
        def one(key: str) -> None:
            with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
                entry = self.store.fetch(key, self.folder / key)
                self._note(key, entry, self.folder / key)

        _each(one, [key for key in keys if not self._is_here(key, self.there[key])])

    def _read_digests(self) -> dict[str, list[str]]:
        try:
            return json.loads(self.store.read(_DIGESTS))
        except (FileNotFoundError, ValueError):
            return {}

    # To the bucket

    def put(self, path: Path) -> None:
        """Puts a file, or the files of a folder in place of those that are there."""
        if path.is_dir():
            files = {self.key(file): file for file in path.rglob("*") if file.is_file()}
            self._delete(key for key in self._listed(path) if key not in files)
        else:
            files = {self.key(path): path}
        self.put_files(files)
        if any(_MODEL.match(key) for key in files):
            self.learn(self._told(files))

    def put_parts(self, folder: Path) -> dict[str, list[str]]:
        """Puts the files of a model that this process has written, and others the other files.

        Returns:
          What the first process has to `learn`.
        """
        files = {self.key(file): file for file in folder.rglob("*") if file.is_file()}
        self.put_files(files)
        return self._told(files)

    def learn(self, told: Mapping[str, list[str]]) -> None:
        """Records files of models in the bucket: version and SHA-256 by key."""
        self._digests = {k: v for k, v in self._digests.items() if k in self.there} | dict(told)
        self.store.put(_DIGESTS, json.dumps(self._digests).encode())

    def _told(self, keys: Iterable[str]) -> dict[str, list[str]]:
        return {
            key: [self.there[key].version, self._copies[key].sha256]
            for key in keys
            if _MODEL.match(key)
        }

    def put_files(self, files: Mapping[str, Path], known: Mapping[str, str] | None = None) -> None:
        """Puts files under these keys; a file that the bucket has already is not sent again.

        Args:
          known: the SHA-256 of files, by key, that need not be computed again.
        """

        def one(key: str) -> None:
            if not self._is_here(key, self.there.get(key)):
                entry = self.store.put(key, files[key])
                self._note(key, entry, files[key], (known or {}).get(key))

        _each(one, list(files))

    def removed(self, path: Path) -> None:
        """Deletes what the bucket has at or below a path.

        For a file, this process must know of it: it has listed it, or put it there.
        """
        key = self.key(path)
        self._delete([key] if key in self.there or path.is_file() else self._listed(path))

    def _delete(self, keys: Iterable[str]) -> None:
        def one(key: str) -> None:
            self.store.delete(key)
            self.there.pop(key, None)

        _each(one, list(keys))

    # What is known

    def digests(self, folder: Path) -> dict[str, str] | None:
        """The SHA-256 of a model's files, by relative path, from the bucket; None if not known."""
        keys, start = self.below(folder), len(self.key(folder)) + 1
        known = {
            key[start:]: self._digests[key][1]
            for key in keys
            if self._digests.get(key, [""])[0] == self.there[key].version
        }
        return known if keys and len(known) == len(keys) else None

    def digest(self, file: Path) -> str | None:
        """The SHA-256 of a file that is as it was put or fetched."""
        key = self.key(file)
        return self._copies[key].sha256 if self.fits(key) else None

    def _note(self, key: str, entry: Entry, file: Path, sha: str | None = None) -> None:
        """Records that a local file has the content of this version of the object."""
        stat = file.stat()
        copy = _Copy(entry.version, stat.st_size, stat.st_mtime_ns, sha or sha256(file))
        with self._lock, self._record.open("a", encoding="utf-8") as f:
            self.there[key], self._copies[key] = entry, copy
            f.write(_line(key, copy))


def local(output: str | Path) -> Path:
    """The folder to work in: `output` itself, or the mirror of a folder in a bucket.

    Raises:
      PathError: this is no folder of a bucket.
      StorageError: the package for buckets is not installed.
    """
    if not is_url(output):
        return Path(output)
    url = str(output).rstrip("/")
    if url not in _mirrors:
        if not _URL.fullmatch(url):
            raise PathError(f"{url}: name a folder in the bucket, such as gs://BUCKET/runs/NAME")
        _mirrors[url] = Mirror(url, Store.at(url), *_free(url))
    return _mirrors[url].folder


def entered(text: str | Path) -> Path:
    """The path that the user entered; for the URL of a folder in a bucket, its mirror.

    No request is sent; `look` reads the bucket.

    Raises:
      PathError: as `paths.place`, or this is no folder of a bucket.
      StorageError: the package for buckets is not installed.
    """
    return local(text) if is_url(text) else place(text)


def look(folder: Path) -> Path:
    """Returns a folder that a command is about to read; a mirror is made equal to its bucket.

    Raises:
      StorageError: the bucket cannot be read.
    """
    if (mirror := of(folder)) is not None:
        mirror.refresh()
        for _ in range(5):  # a run at work may have put a stage.json with what it tells of
            if _versions(mirror.objects()) == _versions(mirror.there):
                break
            mirror.refresh()
    return folder


def of(path: Path) -> Mirror | None:
    """The mirror that a path is in."""
    return next((m for m in _mirrors.values() if path.is_relative_to(m.folder)), None)


def below(path: Path) -> list[Path]:
    """The paths of the objects at or below a path; none if it is not in a mirror."""
    mirror = of(path)
    return [] if mirror is None else [mirror.folder / key for key in mirror.below(path)]


def need(path: Path, names: Iterable[str] | None = None) -> Path:
    """Returns a path after fetching the files there that are in the bucket and not yet here.

    Args:
      names: fetch these only; relative to the path.
    """
    if (mirror := of(path)) is not None:
        mirror.need(path, names)
    return path


def exists(path: Path) -> bool:
    """Returns whether there is a file or folder, here or, not fetched yet, in the bucket."""
    return path.exists() or bool(below(path))


def has_files(folder: Path) -> bool:
    """Returns whether a folder has files at any depth, here or, not fetched yet, in the bucket."""
    return any(file.is_file() for file in folder.rglob("*")) or bool(below(folder))


def named(path: Path) -> str:
    """Returns the name by which a person knows a path: its URL, if it is in a mirror."""
    mirror = of(path)
    return str(path) if mirror is None else f"{mirror.url}/{mirror.key(path)}".rstrip("/")


def in_words(text: str) -> str:
    """A message with the URLs of buckets in place of their mirrors, except where a log stays."""
    for mirror in _mirrors.values():
        here = rf"{re.escape(str(mirror.folder))}(?!/{re.escape(SERVER_LOG)}\b)"
        text = re.sub(here, lambda _, url=mirror.url: url, text)
    return text


def _free(url: str) -> tuple[Path, IO[str]]:
    """A folder in the cache for a mirror, and the lock that keeps other processes out of it."""
    at = cache_root().absolute() / "runs" / hashlib.sha256(url.encode()).hexdigest()[:16]
    at.mkdir(parents=True, exist_ok=True)
    (at / "url").write_text(f"{url}\n", encoding="utf-8")
    for number in itertools.count():
        folder, lock = at / str(number), (at / f"{number}.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            continue
        folder.mkdir(exist_ok=True)
        return folder, lock
    raise AssertionError


def _read(record: Path) -> dict[str, _Copy]:
    """The last line about each key, the only one that is kept; one that a kill tore is left out."""
    copies: dict[str, _Copy] = {}
    for line in record.read_text(encoding="utf-8").splitlines() if record.exists() else ():
        with contextlib.suppress(ValueError, TypeError):
            key, *rest = json.loads(line)
            copies[key] = _Copy(*rest)
    # A kill while this is written costs no more than to fetch the files again.
    record.write_text("".join(_line(*each) for each in copies.items()), encoding="utf-8")
    return copies


def _line(key: str, copy: _Copy) -> str:
    return json.dumps([key, *vars(copy).values()]) + "\n"


def _remove_empty(folder: Path) -> None:
    """Deletes the folders below a folder that have no files."""
    for below in sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True):
        with contextlib.suppress(OSError):  # it is not empty
            below.rmdir()


def _versions(objects: Mapping[str, Entry]) -> dict[str, str]:
    return {key: entry.version for key, entry in objects.items()}


def _is_in(key: str, folder: str) -> bool:
    return not folder or key.startswith(f"{folder}/")


def _each(work: Callable[[str], None], keys: list[str]) -> None:
    """Does some work for each key in parallel; each sign tells other processes that it goes on."""
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for _ in pool.map(work, sorted(keys)):
            here.sign()
