"""Contestant: the SELM update of this package, with stored reference log-probabilities.

usage: selm_train.py MODEL DATA KIND        KIND: distinct, shared or dpo

distinct: three responses per example. shared: in two of three examples the explored response is
also the chosen or the rejected one, and is in the tree once. dpo: pairs, to compare with DPO
trainers.
"""

import dataclasses
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import numpy as np
from worker import jax_worker, read_data, versions

from selm_jax.models.decoder import Decoder
from selm_jax.models.families import read_config
from selm_jax.objectives import losses
from selm_jax.preferences.examples import Example
from selm_jax.preferences.layouts import Group
from selm_jax.preferences.packing import assign_rows, common_shape, pack
from selm_jax.training.loop import mean_lengths
from selm_jax.training.optimizer import optimizer
from selm_jax.training.scoring import Scorer
from selm_jax.training.state import TrainState
from selm_jax.training.update import make_update
from selm_jax.weights.huggingface import load


def main(model, data_file, kind):
    data = read_data(data_file)
    s = data["settings"]
    groups = [[example(kind, row, i) for i, row in enumerate(rows)] for rows in data["train"]]
    shape = smallest_shape(groups)

    config = read_config(Path(model))
    decoder = Decoder(config, remat="full")
    objective = losses.dpo(s["beta"]) if kind == "dpo" else losses.selm(s["beta"], s["alpha"])
    adamw = optimizer("adamw", b1=0.9, b2=0.999, eps=1e-8, weight_decay=0.0)
    update = make_update(decoder, objective, adamw, chunk=32, clip=1.0)
    params = load(Path(model), config)
    one_shape = lambda examples: iter([Group(range(len(examples)), shape)])
    scorer = Scorer(update, lambda batch: batch, one_shape)

    groups = [
        [
            dataclasses.replace(example, reference_logps=reference)
            for example, reference in zip(
                group,
                scorer.logps(params, group),
                strict=True,
            )
        ]
        for group in groups
    ]
    state = TrainState.create(params, adamw)
    rate = np.float32(s["learning_rate"])

    worker = jax_worker()
    worker.ready(versions("jax", "flax", "optax"))
    for group in groups:
        if not worker.wait():
            return
        began = time.perf_counter()
        scorer.logps(state.params, group)
        score_seconds = time.perf_counter() - began
        worker.begin()
        (batch,) = pack(group, shape)
        gradients, sums = update.gradients(state.params, batch, mean_lengths(group))
        state, metrics = update.apply(state, gradients, sums, rate)
        del gradients
        jax.block_until_ready(state)
        worker.end(loss=float(metrics["loss"]), score_seconds=score_seconds)


def smallest_shape(groups):
    """The shape with the fewest positions in which each group fits into one packed batch."""
    lengths = {rows: row_length(groups, rows) for rows in range(1, len(groups[0]) + 1)}
    rows = min(lengths, key=lambda rows: (rows * lengths[rows], -rows))
    return common_shape(groups, rows=rows, time=lengths[rows])


def row_length(groups, rows):
    """The shortest row length with which every group fits into `rows` rows."""
    time = max(example.tokens for group in groups for example in group)
    while any(len(assign_rows(group, time)) > rows for group in groups):
        time += 1
    return time


def example(kind, row, number):
    prompt, responses = tuple(row["prompt"]), [tuple(r) for r in row["responses"]]
    if kind == "distinct":
        roles = {"chosen": 0, "rejected": 1, "explore": 2}
        return Example(str(number), prompt, tuple(responses), roles)
    if kind == "dpo":
        return Example(str(number), prompt, tuple(responses[:2]), {"chosen": 0, "rejected": 1})
    third = number % 3  # explore is chosen, is rejected, or is a third response
    count = 3 if third == 2 else 2
    roles = {"chosen": 0, "rejected": 1, "explore": third}
    return Example(str(number), prompt, tuple(responses[:count]), roles)


if __name__ == "__main__":
    main(*sys.argv[1:])
