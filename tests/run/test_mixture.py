"""`rollout.mixture` in a run: what it draws, what its gap is, and that it can be stopped."""

from __future__ import annotations

import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.iterate import iterate
from selm_jax.run.run import Run
from selm_jax.tables import responses

QUIET = Console(quiet=True)
MIXTURE = {"kind": "pilaf", "weight": 10.0}


def answers(run, t):
    files = responses.files(run.folder.iteration(t) / "responses")
    return [row for file in files for row in responses.read(file)]


def content(run):
    return {
        str(f.relative_to(run.folder.path)): f.read_bytes()
        for f in run.folder.path.rglob("iteration_*/**/*.*")
        if f.suffix in (".parquet", ".safetensors")
    }


@pytest.mark.slow
def test_a_run_with_a_mixture_goes_on_to_the_same_bytes(tmp_path, monkeypatch):
    def made(name, **changes):
        file = tiny.experiment(
            tmp_path, output=str(tmp_path / name), data__heldout=None,
            training__reference_policy="start", training__learning_rate=1e-2, **changes,
        )  # fmt: skip
        return Run(config.load(file), QUIET)

    plain, whole = made("plain"), made("whole", rollout__mixture=MIXTURE)
    iterate(plain)
    iterate(whole)
    assert answers(plain, 1) == answers(whole, 1), "the first policy is its own reference"
    pairs = list(zip(answers(plain, 2), answers(whole, 2), strict=True))
    assert len(pairs) == 16 * 3
    assert all(a == b for a, b in pairs if a.kind == "greedy")
    changed = sum(a.token_ids != b.token_ids for a, b in pairs)
    assert 4 <= changed <= 28, "some pairs of samples are mixed and others are not"
    for t in (1, 2):
        (gap,) = whole.folder.logged("score", t)
        assert gap["gap/largest"] < 1e-4, "what is compared is the policy's log-probability"
    file = responses.files(whole.folder.iteration(2) / "responses")[0]
    assert responses.sampling_of(file)["mixture"] == MIXTURE

    write, written = responses.write, []

    def stopping(path, *rest):
        if len(written) == 4:  # of three parts of the first iteration, and one of the second
            raise KeyboardInterrupt
        written.append(path)
        write(path, *rest)

    stopped = made("stopped", rollout__mixture=MIXTURE)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(responses, "write", stopping)
        iterate(stopped)
    again = made("stopped", rollout__mixture=MIXTURE)
    iterate(again)
    assert content(again) == content(whole)
