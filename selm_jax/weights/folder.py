"""A model folder as it is found: what keeps it from being one, and the digest of what is read."""

from __future__ import annotations

import hashlib
from pathlib import Path

from safetensors import SafetensorError, safe_open

from selm_jax.weights.files import INDEX, WHOLE, WeightsError, read_index
from selm_jax.weights.wheels import sha256_of


def problems_of(folder: Path) -> list[str]:
    """What keeps this folder from being a model; empty when nothing does."""
    problems = []
    if not (folder / "config.json").is_file():
        problems.append("config.json is missing")
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        problems.append("tokenizer.json or tokenizer_config.json is missing")
    try:
        file_of = read_index(folder)
    except WeightsError as error:
        return [*problems, str(error)]
    wanted = set(file_of.values()) if file_of else {WHOLE}
    there = {name for name in wanted if (folder / name).is_file()}
    if file_of:
        problems += [f"{name} is missing ({INDEX} names it)" for name in wanted - there]
    elif not there:
        problems.append(
            f"neither {WHOLE} nor {INDEX} is there (pickled weights such as *.bin are not read)"
        )
    for name in sorted(there):
        try:
            # Reads the header alone, and compares it with the file's size.
            with safe_open(folder / name, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            problems.append(f"{name} is damaged or cut off: {error}")
    return problems


def folder_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of a folder's model files, in the order of names."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.is_file() and file.suffix in (".safetensors", ".json", ".jinja", ".model", ".txt"):
            digest.update(f"{file.name}\0{sha256_of(file)}\n".encode())
    return digest.hexdigest()
