"""A run whose start model is in a bucket ends in the bytes of one that has it on the disk."""

from __future__ import annotations

import json

import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.iterate import iterate
from selm_jax.run.run import Run
from selm_jax.shell.storage import Store


@pytest.mark.slow
@pytest.mark.parametrize("bucket", ["gs"], indirect=True)
def test_a_run_from_a_bucket_ends_in_the_same_bytes(finished_run, bucket, tmp_path, monkeypatch):
    tiny.on_first_device(monkeypatch)
    monkeypatch.setenv("SELM_CACHE", str(tmp_path / "cache"))
    store = Store.at(f"{bucket}/models/tiny")
    for file in (finished_run / "model").iterdir():
        store.put(file.name, file)
    file = tiny.experiment(tmp_path, model__source=store.url)
    iterate(Run(config.load(file), Console(quiet=True)))
    for t in (1, 2):
        name = f"run/iteration_{t}/model/model.safetensors"
        assert (tmp_path / name).read_bytes() == (finished_run / name).read_bytes()
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    assert manifest["model"]["kind"] == "bucket" and manifest["model"]["source"] == store.url
    assert not [*(tmp_path / "cache").rglob("*.safetensors")]
