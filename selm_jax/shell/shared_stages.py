"""Stores the outputs of finished stages, so that several runs can share them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from selm_jax.shell import mirror as mirrors
from selm_jax.shell.artifacts import (
    ArtifactError,
    digest,
    read_sealed,
    remove,
    whole,
    write_sealed,
)


def key_of(**depends_on: Any) -> str:
    """The SHA-256, in hex, of the JSON values on which a piece of work depends."""
    text = json.dumps(depends_on, sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


class SharedStages:
    """A folder of finished stages' outputs, keyed by a digest of everything they depend on.

    An entry is a folder, named by the digest of everything that its content depends on. It contains
    the files and folders that a stage wrote, and `entry.json` with their digests and further
    values. Finished files are never written to, only replaced; so an entry and the runs that use it
    share the same bytes as hard links, or as copies if the file system has no links. In a bucket
    both are objects. Of several processes only the first may use it.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)

    def name_of(self, run: Path) -> str:
        """The path of a run's folder relative to the store's parent, so that both can be moved."""
        return os.path.relpath(mirrors.named(run), mirrors.named(self.folder.parent))

    def put(self, key: str, outputs: Mapping[str, Path], about: Mapping[str, Any]) -> None:
        """Stores the outputs, by name, and JSON values that describe them."""
        with whole(self.folder / key, replaces_folder=True) as partial:
            partial.mkdir()
            for name, path in outputs.items():
                _link(path, partial / name)
            digests = {name: digest(path) for name, path in outputs.items()}
            write_sealed(partial / "entry.json", {"outputs": digests, "about": about})

    def take(self, key: str, folder: Path) -> dict[str, Any] | None:
        """Puts the outputs of an entry into `folder`; returns the values stored with the outputs.

        Returns None if there is no such entry. Removes the entry and returns None if it is damaged.
        """
        entry = self.folder / key
        if not mirrors.exists(entry):
            return None
        told = _told(mirrors.need(entry))
        if told is None:
            remove(entry)
            return None
        for name in told["outputs"]:
            with whole(folder / name, replaces_folder=True) as partial:
                _link(entry / name, partial)
        return told["about"]


def _told(entry: Path) -> dict[str, Any] | None:
    """The content of an entry's `entry.json`; None if any file of the entry is damaged."""
    try:
        told = read_sealed(entry / "entry.json")
        about, outputs = told["about"], told["outputs"].items()
        if not isinstance(about, dict):
            return None
        kept = {path.name for path in entry.iterdir()}
        return told if all(n in kept and digest(entry / n) == sha for n, sha in outputs) else None
    except (OSError, ArtifactError, KeyError, TypeError, AttributeError):
        return None


def _link(source: Path, target: Path) -> None:
    """Makes `target` a hard link to each file of `source`, or a copy where links are impossible."""

    def one(a: str, b: str) -> None:
        try:
            os.link(a, b)
        except OSError:  # another file system, or one that has no hard links
            shutil.copyfile(a, b)

    if source.is_dir():
        shutil.copytree(source, target, copy_function=one)
    else:
        one(str(source), str(target))
