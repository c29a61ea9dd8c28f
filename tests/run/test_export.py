"""An export names its origin so that others can use it, without paths of this machine."""

from __future__ import annotations

import pytest

from selm_jax.run.inputs import Model
from selm_jax.shell import mirror
from selm_jax.shell.storage import Store


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (
            {"source": "org/name", "kind": "hub", "revision": "main", "commit": "a" * 40},
            ("org/name", "a" * 40),
        ),
        (
            {"source": "org/name", "kind": "wheel", "revision": "x==1", "sha256": "0"},
            ("org/name", None),
        ),
        ({"source": "models/mine", "kind": "folder", "sha256": "0"}, ("models/mine", None)),
        ({"source": "~/m.gguf", "kind": "gguf", "sha256": "0"}, ("~/m.gguf", None)),
    ],
    ids=["hub", "wheel", "folder", "gguf"],
)  # fmt: skip
def test_adapters_name_their_base_as_the_experiment_does(origin, expected, tmp_path):
    start = Model(tmp_path / "cache" / "snapshots" / "a", origin=origin)
    assert start.called == expected
    folder = tmp_path / "run" / "iteration_1"
    assert Model(folder / "model", folder).called == (str(folder / "model"), None)


def test_adapters_of_a_run_in_a_bucket_name_its_url(tmp_path, monkeypatch):
    url = "gs://bucket/run"
    monkeypatch.setattr(mirror, "_mirrors", {url: mirror.Mirror(url, Store(url, None), tmp_path)})
    folder = tmp_path / "iteration_1"
    assert Model(folder / "model", folder).called == (f"{url}/iteration_1/model", None)
