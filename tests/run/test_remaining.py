"""The time left of a run, from what its stages took so far."""

from __future__ import annotations

import pytest

from selm_jax.run.remaining import entries_of, time_left
from selm_jax.shell.artifacts import Stages

TAKES = {"generate": 10.0, "rank": 1.0, "score": 2.0, "train": 20.0, "export": 3.0, "evaluate": 4.0}


def did(run, t: int, *names: str, factor: float = 1.0) -> None:
    (run / f"iteration_{t}").mkdir(exist_ok=True, parents=True)
    for name in names:
        Stages(run / f"iteration_{t}").finish(name, {}, {}, {}, {}, TAKES[name] * factor)


def test_it_is_known_when_every_stage_was_timed_once(tmp_path):
    run = tmp_path / "run"
    assert time_left(entries_of(run), 3) is None
    did(run, 0, "evaluate")
    did(run, 1, "generate", "rank", "score", "train")
    assert time_left(entries_of(run), 3) is None
    did(run, 1, "export")
    assert time_left(entries_of(run), 3) == pytest.approx(
        4 + 2 * 40
    )  # evaluate of 1, and two iterations
    did(run, 1, "evaluate")
    assert time_left(entries_of(run), 3) == pytest.approx(2 * 40)


def test_it_is_the_mean_of_what_was_timed_without_the_stage_at_work(tmp_path):
    did(tmp_path, 1, *TAKES)
    did(tmp_path, 2, "generate", "rank", "score", factor=3)
    (tmp_path / "iteration_3").mkdir()
    means = {
        name: TAKES[name] * (2 if name in ("generate", "rank", "score") else 1) for name in TAKES
    }
    rest_of_2 = means["export"] + means["evaluate"]
    assert time_left(entries_of(tmp_path), 3, "train", 2) == pytest.approx(
        rest_of_2 + sum(means.values())
    )
    assert time_left(entries_of(tmp_path), 2, "train", 2) == pytest.approx(rest_of_2)


def test_without_heldout_prompts_no_evaluation_is_expected(tmp_path):
    did(tmp_path, 1, *[name for name in TAKES if name != "evaluate"])
    assert time_left(entries_of(tmp_path), 2) == pytest.approx(36)
