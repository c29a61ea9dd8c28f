"""Optimisers and learning-rate schedules, all optax's."""

from __future__ import annotations

import math

import optax

SCHEDULES = ("cosine", "linear", "constant")
OPTIMIZERS = ("adamw", "adafactor", "rmsprop")


def learning_rate(schedule: str, peak: float, updates: int, warmup_ratio: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then the schedule, which ends at zero after the last update.

    The schedule is fresh in every iteration. Warm-up takes ceil(warmup_ratio * updates) updates, as
    in the authors' runs (6 of 59, 16 of 159). As there, the k-th of w warm-up updates has
    (k - 1) / w of the peak, so that the first update of an iteration with warm-up changes nothing.
    """
    warmup = math.ceil(warmup_ratio * updates)
    rest = max(updates - warmup, 1)
    if schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, rest)
    elif schedule == "linear":
        after = optax.linear_schedule(peak, 0.0, rest)
    elif schedule == "constant":
        after = optax.constant_schedule(peak)
    else:
        raise ValueError(f"schedule {schedule!r} is not one of {SCHEDULES}")
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer(
    name: str, *, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """Gradients to steps at learning rate 1.

    Weight decay is decoupled: it is multiplied by the learning rate like the rest of the step.
    """
    if name == "adamw":
        direction = optax.scale_by_adam(b1=b1, b2=b2, eps=eps)
    elif name == "adafactor":  # without its own schedule; `scale(-1)` undoes the sign it ends with
        direction = optax.chain(optax.adafactor(1.0), optax.scale(-1.0))
    elif name == "rmsprop":
        direction = optax.scale_by_rms(decay=b2, eps=eps)
    else:
        raise ValueError(f"optimizer {name!r} is not one of {OPTIMIZERS}")
    decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    return optax.chain(direction, *decay, optax.scale(-1.0))
