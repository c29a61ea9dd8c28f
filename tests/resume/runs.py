"""Starts, watches and compares runs for the tests that kill them."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

import forked
import tiny

from selm_jax.shell.storage import Store

# (devices of a process, processes)
ONE, TWO = (1, 1), (4, 2)
STAGES = ("generate", "rank", "score", "train", "export", "evaluate")
ORDER = [(0, "evaluate"), *((t, stage) for t in (1, 2) for stage in STAGES)]
# And the digests that records carry of themselves and of lines, with their times.
_TIMES = ("seconds", "created", "sha256", "logged")
_READINGS = ("time/", "memory/")  # of this machine, in the lines of metrics.jsonl


def experiment(folder: Path) -> Path:
    """Seven updates in each of two iterations, with a checkpoint after every third; three parts of
    responses, four of scores."""
    return tiny.experiment(
        folder, output="run", training__global_batch=2, training__checkpoint_every=3,
        feedback__prompts_per_part=4,
    )  # fmt: skip


def start(
    file: Path, where: Path, shape=ONE, *overrides: str, patience: float = 1800
) -> forked.Selm:
    """Begins, or goes on with, the run in the folder `run` below `where`."""
    devices, processes = shape
    return forked.Selm(
        ["run", file, *overrides], folder=where, cache=file.parent / f"cache-{devices}-{processes}",
        devices=devices, processes=processes, log=where.with_suffix(".log"), patience=patience,
    )  # fmt: skip


def finish(file: Path, where: Path, shape=ONE, *overrides: str) -> Path:
    run = start(file, where, shape, *overrides)
    statuses = run.wait(900)
    assert statuses == [0] * shape[1], (statuses, run.output())
    return where / "run"


def stages(folder: Path) -> dict[tuple[int, str], dict]:
    """What every stage.json of a run says, by iteration and stage."""
    found = {}
    for t in (0, 1, 2):
        file = folder / f"iteration_{t}" / "stage.json"
        if file.exists():
            found |= {(t, k): v for k, v in json.loads(file.read_text()).items()}
    return found


def wait_for(run: forked.Selm, folder: Path, at: tuple[int, str]) -> bool:
    """Waits until the process has begun this stage or a later one. False if it ended before."""
    file = folder / f"iteration_{at[0]}" / "stage.json"
    before = _stamp(file)
    while run.running():
        # Beginning writes the file anew, whatever stands in it from processes that were killed.
        if _stamp(file) != before:
            begun = [k for k, v in stages(folder).items() if not v["done"]]
            if any(ORDER.index(k) >= ORDER.index(at) for k in begun):
                return True
        elif any((folder / f"iteration_{t}").exists() for t in range(at[0] + 1, 3)):
            return True  # that one was done already
        time.sleep(0.002)
    return False


def is_done(folder: Path, at: tuple[int, str]) -> bool:
    return stages(folder).get(at, {"done": False})["done"]


def _stamp(file: Path) -> int:
    return file.stat().st_mtime_ns if file.exists() else 0


def content(folder: Path) -> dict[str, object]:
    """Every artefact by name: JSON without its times, all else as bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        own = (".lock", ".lock-clock", "digests.json")  # the latter two are of a bucket
        if path.is_dir() or path.name in ("report.html", *own):
            continue  # the page shows the recorded times
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def content_of(store: Store, folder: Path) -> dict[str, object]:
    """`content` of a run in a store: of its objects, which are copied into `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    for key in store.list():
        store.fetch(key, folder / key)
    return content(folder)


def timeless(x):
    if isinstance(x, dict):
        return {k: timeless(v) for k, v in x.items() if not _is_time(k)}
    return [timeless(each) for each in x] if isinstance(x, list) else x


def _is_time(key: str) -> bool:
    return key in _TIMES or key.startswith(_READINGS)


def differences(found: dict, expected: dict) -> list[str]:
    names = sorted(found.keys() | expected.keys())
    return [name for name in names if found.get(name) != expected.get(name)]
