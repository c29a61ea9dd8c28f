"""Runs in a bucket that are killed at random end with the bytes of a local, uninterrupted one."""

from __future__ import annotations

import pytest
import runs
from killing import KILLS, kill

from selm_jax.shell.storage import Store

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("shape", "kills"), KILLS)
def test_killed_runs_in_a_bucket_end_with_the_bytes_of_a_local_run(
    file, whole, shape, kills, tried
):
    """The processes have no folder in common, and every other attempt is on new machines."""
    pytest.importorskip("obstore", reason="obstore is not installed: no bucket is tried")
    expected, stages = whole(shape)
    where = file.parent / f"bucket-{shape[1]}"
    output = f"output=file://{where}/run"
    mirrors = file.parent / f"cache-{shape[0]}-{shape[1]}" / "runs"
    told = kill(file, where, shape, kills, stages, output, mirrors=mirrors)
    # What a kill in the middle of a write leaves there: for the store, no object (test_storage).
    (where / "run/iteration_1/scores/.part-00001-of-00004.parquet.sha256#1").write_bytes(b"half")
    runs.finish(file, where, shape, output)
    found = runs.content_of(Store.at(output.removeprefix("output=")), where / "objects")
    tried(f"{shape[1]} x {shape[0]} devices, in a bucket: {told}")
    where_it_says_so = {
        "config.yaml", "manifest.json", *(f"iteration_{t}/model/README.md" for t in (1, 2)),
    }  # fmt: skip
    assert set(runs.differences(found, expected)) == where_it_says_so
    for name in where_it_says_so - {"manifest.json"}:
        assert found[name].replace(output[7:].encode(), b"run") == expected[name]
