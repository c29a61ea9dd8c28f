"""kill -9 at random moments: a run that was killed ends with the bytes of one that was not."""

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

KILLS = 10
_TIMES = ("seconds", "created", "time/seconds", "time/tokens_per_second")


def start(file: Path, where: Path) -> subprocess.Popen:
    """Begins, or goes on with, the run in the folder `run` below `where`."""
    where.mkdir(exist_ok=True)
    environment = os.environ | {"SELM_CACHE": str(file.parent / "cache"), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    return subprocess.Popen(
        [sys.executable, "-m", "selm_jax", "run", str(file)],
        cwd=where,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


def state(folder: Path) -> frozenset:
    """All that is visible of a run folder at this moment; a moment is a change of it."""
    found = set()
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                stat = os.stat(os.path.join(root, name))
            except FileNotFoundError:
                continue
            found.add((root, name, stat.st_size, stat.st_mtime_ns))
    return frozenset(found)


def watch(process: subprocess.Popen, folder: Path, kill_at: int | None) -> int:
    """Counts the changes of the folder while the process works; kills it at the given one."""
    events, last = 0, state(folder)
    while process.poll() is None:
        now = state(folder)
        if now != last:
            events, last = events + 1, now
            if events == kill_at:
                process.send_signal(signal.SIGKILL)
                process.wait()
    return events


def content(folder: Path) -> dict[str, object]:
    """Every artefact by name: JSON without its times, all else as bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_dir() or path.name in ("report.html", ".lock"):
            continue  # the page shows the recorded times
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".jsonl":
            found[name] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            found[name] = timeless(json.loads(path.read_text()))
        else:
            found[name] = path.read_bytes()
    return found


def timeless(x):
    if isinstance(x, dict):
        return {k: timeless(v) for k, v in x.items() if k not in _TIMES}
    return x


@pytest.mark.slow
def test_killed_runs_end_with_the_same_bytes(tmp_path):
    file = tiny.experiment(tmp_path, output="run")
    process = start(file, tmp_path / "whole")
    moments = watch(process, tmp_path / "whole" / "run", None)
    assert process.returncode == 0, process.stderr.read().decode()
    expected = content(tmp_path / "whole" / "run")
    assert moments > 40

    chance = random.Random(0)
    kills, stages = 0, set()
    while True:
        process = start(file, tmp_path / "killed")
        # A restart has fewer changes before it; small numbers keep the kills spread over the run.
        at = chance.randint(1, max(2, 2 * moments // KILLS)) if kills < KILLS else None
        watch(process, tmp_path / "killed" / "run", at)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, process.stderr.read().decode()
        kills += 1
        for entry in (tmp_path / "killed" / "run").glob("iteration_*/stage.json"):
            stages |= {
                (entry.parent.name, name)
                for name, stage in json.loads(entry.read_text()).items()
                if not stage["done"]
            }
    print(f"\n{kills} kills, inside {len(stages)} different stages: {sorted(stages)}")
    assert kills >= KILLS - 2
    found = content(tmp_path / "killed" / "run")
    assert found.keys() == expected.keys()
    for name in expected:
        assert found[name] == expected[name], name
