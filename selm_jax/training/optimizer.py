"""Optimisers and learning-rate schedules, all from optax."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import optax

# The schedule after the warm-up, as a function of the peak and the number of remaining updates.
SCHEDULES: Mapping[str, Callable[[float, int], optax.Schedule]] = {
    "cosine": optax.cosine_decay_schedule,
    "linear": lambda peak, updates: optax.linear_schedule(peak, 0.0, updates),
    "constant": lambda peak, updates: optax.constant_schedule(peak),
}
# The direction of a step, as a function of b1, b2 and eps; an optimiser may ignore some of them.
OPTIMIZERS: Mapping[str, Callable[[float, float, float], optax.GradientTransformation]] = {
    "adamw": lambda b1, b2, eps: optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
    # Adafactor without its own schedule; optax's version negates the step, `scale(-1)` undoes this.
    "adafactor": lambda b1, b2, eps: optax.chain(optax.adafactor(1.0), optax.scale(-1.0)),
    "rmsprop": lambda b1, b2, eps: optax.scale_by_rms(decay=b2, eps=eps),
}


def learning_rate(schedule: str, peak: float, updates: int, warmup_ratio: float) -> optax.Schedule:
    """Linear warm-up to `peak`, then the named schedule up to the iteration's last update.

    `cosine` and `linear` reach zero after the last update. The schedule starts again in every
    iteration. Warm-up takes ceil(warmup_ratio * updates) updates, as in the authors' runs (6 of 59,
    16 of 159). As there, the k-th of w warm-up updates has (k - 1) / w of the peak, so that the
    first update of an iteration with warm-up changes nothing.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}; expected one of {', '.join(SCHEDULES)}")
    warmup = math.ceil(warmup_ratio * updates)
    after = SCHEDULES[schedule](peak, max(updates - warmup, 1))
    if warmup == 0:
        return after
    return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])


def optimizer(
    name: str, *, b1: float, b2: float, eps: float, weight_decay: float
) -> optax.GradientTransformation:
    """The optimizer `name`, which turns gradients into steps for a learning rate of 1.

    Weight decay is decoupled: it is multiplied by the learning rate like the rest of the step.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is {name!r}; expected one of {', '.join(OPTIMIZERS)}")
    decay = [optax.add_decayed_weights(weight_decay)] if weight_decay else []
    return optax.chain(OPTIMIZERS[name](b1, b2, eps), *decay, optax.scale(-1.0))
