"""Gets a model's config.json without its weights; `selm plan` needs nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from huggingface_hub import hf_hub_download, try_to_load_from_cache

from selm_jax.shell.storage import is_url
from selm_jax.weights import sources
from selm_jax.weights.sources import SourceError
from selm_jax.weights.wheels import WHEELS


def config_json(source: str, revision: str | None = None, cache: Path | None = None) -> Path:
    """Returns the path of a model's config.json; does not download the model's weights.

    `source` is a local folder, a GGUF file, a folder in a bucket or a Hub id.

    Raises:
      SourceError: if it is neither on this machine nor on the Hub; the message says what to do.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise SourceError(
                f"{path}: config.json is missing. Give the folder of a Hugging Face model"
            )
        return path / "config.json"
    if path.suffix == ".gguf" or is_url(source):
        return sources.resolve(source, cache=cache).path / "config.json"
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", source):
        raise SourceError(
            f"{source}: there is no such folder (the current one is {Path.cwd()}), and this is not "
            "a Hub id. To plan without the model, give its config.json: --config FILE"
        )
    here = try_to_load_from_cache(source, "config.json", revision=revision)
    if isinstance(here, str):
        return Path(here)
    if revision is None and (wheel := WHEELS.get(source)) is not None:
        root = sources.cache_root() if cache is None else cache
        stem = f"{source.replace('/', '--')}-wheel"
        converted = sources._converted(root, stem, wheel.gguf_sha256) / "config.json"
        if converted.is_file():
            return converted
    try:
        return Path(
            sources._within(
                sources._HUB_DEADLINE,
                lambda: hf_hub_download(source, "config.json", revision=revision, etag_timeout=5),
            )
        )
    except Exception as error:  # the Hub's client raises various exceptions, as in `sources`
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise SourceError(
            f"{source}: its config.json is not on this machine, and could not be downloaded from "
            f"the Hub ({reason}). Give the file: --config FILE"
        ) from error
