"""The quickstart on the real model ends in a container of 3 GiB."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from selm_jax.shell import artifacts

ROOT = Path(__file__).parents[2]
GROUPS = Path("/sys/fs/cgroup")


@pytest.fixture
def container() -> Iterator[Path]:
    """A control group of at most 3 GiB of memory, version 1 or 2."""
    old = GROUPS / "memory"
    group = (old if old.is_dir() else GROUPS) / f"selm-test-{os.getpid()}"
    limit = group / ("memory.limit_in_bytes" if old.is_dir() else "memory.max")
    try:
        group.mkdir()
        limit.write_text(str(3 * 2**30))
    except OSError as e:
        pytest.skip(f"no control group can be made here: {e}")
    yield group
    group.rmdir()


@pytest.mark.long
def test_the_quickstart_ends_in_3_gib(container, tmp_path):
    """The cache is empty, so the converter and the compiler need their memory too."""
    run = f"""echo $$ > {container}/cgroup.procs
        exec {sys.executable} -m selm_jax run experiments/quickstart.yaml iterations=1 \
        training.learning_rate=2e-5 data.limit=24 data.heldout_limit=4 output={tmp_path}/run"""
    done = subprocess.run(
        ["bash", "-c", run], cwd=ROOT, env=os.environ | {"SELM_CACHE": str(tmp_path / "cache")},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    told = artifacts.read_sealed(tmp_path / "run" / "manifest.json")
    assert told["sizes"]["training.rows"] == 8 and told["sizes"]["training.remat"] == "full"
