"""Copies of a bucket's files in the cache."""

from __future__ import annotations

import os
import time

import pytest

from selm_jax.shell.bucket_files import copied, files_at
from selm_jax.shell.storage import Store

pytest.importorskip("obstore")


def test_what_a_killed_process_left_goes_after_a_day(tmp_path):
    (tmp_path / "bucket").mkdir()
    url = f"file://{tmp_path}/bucket"
    Store.at(url).put("a.jsonl", b"{}")
    cache = tmp_path / "data"
    out = copied(*files_at(url, sorted), cache)
    assert (out / "a.jsonl").read_bytes() == b"{}"
    old, young = (cache / f".incoming-{name}" for name in ("old", "young"))
    for folder in (old, young):
        folder.mkdir()
    yesterday = time.time() - 25 * 3600
    os.utime(old, (yesterday, yesterday))
    copied(*files_at(url, sorted), cache)  # also if there is nothing left to copy
    assert not old.exists() and young.exists()
