"""Checks a model folder, computes its digest, and lists the files to copy with the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from selm_jax.shell.paths import is_leftover
from selm_jax.weights.bucket import is_there
from selm_jax.weights.files import INDEX, WHOLE, WeightsError, damage_of, read_index
from selm_jax.weights.wheels import sha256_of

NAMED_TEMPLATES = "additional_chat_templates/*.jinja"

IMAGES = ("preprocessor_config.json", "processor_config.json")  # a text model has no use for them

# Files that are copied with a model: tokenizer, chat templates and generation settings; and the
# licence, because many licences require it. No code and no pickles.
SETTINGS = (
    "tokenizer.json",
    "tokenizer.*.json",
    "tokenizer_config.json",
    "*.model",
    "tokenizer.model.*",
    "*.tiktoken",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
    "vocab.bpe",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    NAMED_TEMPLATES,
    *IMAGES,
    "generation_config.json",
)
LICENCES = ("LICENSE*", "NOTICE*", "USE_POLICY*")


def carried(folder: Path) -> Iterator[str]:
    """Yields the files that are copied with the model, as paths relative to its folder."""
    return (n for n in _names(folder, *SETTINGS, *LICENCES) if (folder / n).is_file())


def links_out(folder: Path) -> list[str]:
    """Lists a message for each file to export that is a broken link or links out of the folder.

    An export would publish the target of such a link with the model. In the Hub's cache, files of a
    snapshot are links into the folder `blobs` beside it; these are allowed.
    """
    home = folder.resolve()
    inside = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    wrong = []
    for name in _names(folder, *SETTINGS, *LICENCES, "config.json", "README.md"):
        target = Path(os.path.realpath(folder / name))  # does not fail on a circle of links
        if not target.exists():
            wrong.append(f"{name} is a link to {target}, which does not exist")
        elif not any(target.is_relative_to(each) for each in inside):
            wrong.append(
                f"{name} is a link to {target}, outside the folder, and an export would publish "
                "that file; replace the link by the file itself (cp -L)"
            )
    return wrong


def _names(folder: Path, *patterns: str) -> Iterator[str]:
    """Yields the names in a folder that match a pattern, including broken links, unlike glob."""
    for place in (folder, (folder / NAMED_TEMPLATES).parent):
        for entry in sorted(place.iterdir()) if place.is_dir() else []:
            name = entry.relative_to(folder).as_posix()
            # Here a star matches a part of a name, but not a slash.
            if any(fnmatchcase(name, p) and name.count("/") == p.count("/") for p in patterns):
                yield name


def problems_of(folder: Path) -> list[str]:
    """Lists the reasons why a folder is not a usable model; empty if it is usable."""
    problems = links_out(folder)
    if not (folder / "config.json").is_file():
        problems.append("config.json is missing")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        problems.append("tokenizer.json or tokenizer_config.json is missing")
    try:
        file_of = read_index(folder)
    except WeightsError as error:
        return [*problems, str(error)]
    wanted = set(file_of.values()) if file_of else {WHOLE}
    there = {name for name in wanted if is_there(folder / name)}
    if file_of:
        problems += [f"{name} is missing ({INDEX} names it)" for name in wanted - there]
    elif not there:
        problems.append(
            f"neither {WHOLE} nor {INDEX} is there (pickled weights such as *.bin are not read)"
        )
    damaged = ((name, damage_of(folder / name)) for name in sorted(there))
    return problems + [f"{name} {wrong}" for name, wrong in damaged if wrong]


def folder_digest(folder: Path) -> str:
    """The SHA-256 of the names and contents of a folder's model files, in order of their names."""
    digest = hashlib.sha256()
    files = [*sorted(folder.iterdir()), *sorted(folder.glob(NAMED_TEMPLATES))]
    for file in (file for file in files if not is_leftover(file.name)):
        if file.is_file() and file.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"):
            name = file.relative_to(folder).as_posix()
            digest.update(f"{name}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()
