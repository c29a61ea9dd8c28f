"""The updates of an iteration: their batches, and what is reported of them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from selm_jax.config import Training
from selm_jax.models.config import DecoderConfig
from selm_jax.preferences.examples import Example
from selm_jax.preferences.packing import pack
from selm_jax.training.loop import TrainingError, TrainingPlan, train
from selm_jax.training.state import TrainState
from selm_jax.training.update import Update
from selm_jax.training.work import Speed

SETTINGS = Training(learning_rate=(1e-3,), global_batch=16, rows=8)


def examples(count: int) -> list[Example]:
    rng = np.random.default_rng(0)
    return [
        Example.of(
            str(i), (1,) * rng.integers(5, 40),
            {"chosen": (2,) * rng.integers(1, 99), "rejected": (3,) * rng.integers(1, 99)},
        )
        for i in range(count)
    ]  # fmt: skip


def plan_of(row_length, found=None, ways: int = 1) -> TrainingPlan:
    settings = dataclasses.replace(SETTINGS, row_length=row_length)
    return TrainingPlan.make(
        settings, found or examples(67), seed=3, iteration=1, rows=settings.rows, ways=ways
    )


@pytest.mark.parametrize("ways", [1, 4, 8])
def test_rows_are_fitted_to_the_updates(ways):
    fitted = plan_of("auto", ways=ways)
    longest = max(e.tokens for e in examples(67))
    fixed = [plan_of(-(-longest // 32) * 32), plan_of(1024)]
    padded = [plan.counts()["tokens_padded"] for plan in (fitted, *fixed)]
    assert padded[0] == min(padded)
    assert fitted.shape.rows % ways == 0 and fitted.shape.rows <= SETTINGS.rows
    assert fitted.shape.time >= longest and fitted.updates == fixed[0].updates


def test_a_number_wins():
    assert (plan_of(992).shape.rows, plan_of(992).shape.time) == (8, 992)


def test_a_plan_is_the_same_every_time_so_that_a_run_can_be_resumed():
    assert plan_of("auto") == plan_of("auto")


def test_the_report_says_how_long_rows_are_and_counts_the_batches_that_are_made():
    for plan in (plan_of("auto"), plan_of(320)):
        counts, shape = plan.counts(), plan.shape
        batches = [batch for update in plan.updates for batch in pack(update, shape)]
        assert (counts["rows"], counts["row_length"]) == (shape.rows, shape.time)
        assert counts["tokens_padded"] == sum(batch.tokens.size for batch in batches)
        assert counts["tokens_useful"] == sum((batch.segment > 0).sum() for batch in batches)


class NoCheckpoints:
    def save(self, state):
        pass


def told(on_nonfinite):
    """What is reported of four updates, of which the second is not finite."""
    settings = dataclasses.replace(SETTINGS, on_nonfinite=on_nonfinite)
    plan = TrainingPlan.make(
        settings, examples(67), seed=3, iteration=1, rows=settings.rows, ways=1
    )

    def apply(state, gradients, sums, rate):
        loss = np.nan if state.step == 1 else 0.5
        metrics = {"loss": loss, "grad_norm": 1.0, "skipped": float(np.isnan(loss))}
        return state.replace(step=state.step + 1), metrics

    update = Update(*[None] * 6)._replace(gradients=lambda *_: (None, {}), apply=apply)
    update = update._replace(add=lambda *_: (None, {}))
    lines = []
    speed = Speed(DecoderConfig(96, 32, 4, 2, 8, 64, (), 1e-5, False, 64, "L"), None)
    state = TrainState(np.int32(0), {}, ())
    train(
        plan, update, state, NoCheckpoints(), peak=1e-3, speed=speed, place=lambda batch: batch,
        report=lines.append,
    )  # fmt: skip
    return lines


def test_an_update_that_is_not_finite_stops_training_unless_it_is_skipped():
    with pytest.raises(TrainingError, match=r"update 2: loss is not finite.*on_nonfinite: skip"):
        told("stop")
    lines = told("skip")
    assert [line["loss"] for line in lines] == [0.5, None, 0.5, 0.5]
    assert [line["skipped"] for line in lines] == [0, 1, 0, 0]
    assert "NaN" not in json.dumps(lines)
