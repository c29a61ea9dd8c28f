"""Runs many settings of an algorithm with the same seeds, in one compiled program.

Cells differ only in their settings, so they can be compared for each seed, which removes most of
the noise.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selm_jax.lab.algorithms import Algorithm, Length, Settings
from selm_jax.lab.rounds import Trace, run
from selm_jax.lab.worlds import LANDSCAPES, WorldShape, make_world

Cell = dict[str, Any]  # settings of one cell: landscape, coverage, and fields of `Settings`

BATCH = 256  # the most runs computed together: fills vector units, but still fits in the cache
SETTINGS = tuple(field.name for field in dataclasses.fields(Settings))
ASSUMED = 0.1  # the learner's temperature if the feedback's is 0


def run_many(
    shape: WorldShape,
    algorithm: Algorithm,
    length: Length,
    cells: Sequence[Cell],
    *,
    seeds: int,
    seed: int = 0,
) -> Trace:
    """Runs every cell (settings) with all seeds; returns a Trace of [cells, seeds, rounds].

    The learner knows the feedback's temperature unless a cell sets `assumed`. A seed determines the
    world and all noise of the run. Equal arguments give bit-identical results.
    """
    defaults = {"landscape": "two_peaks", "coverage": 0.05}
    defaults |= {name: getattr(Settings(), name) for name in SETTINGS}
    if unknown := {key for cell in cells for key in cell} - defaults.keys():
        raise ValueError(f"cells have unknown keys {sorted(unknown)}; use {list(defaults)}")
    full = [defaults | cell for cell in cells]
    for cell, given in zip(full, cells, strict=True):
        cell["assumed"] = given.get("assumed", cell["temperature"] or ASSUMED)
        cell["landscape"] = LANDSCAPES.index(cell["landscape"])
    columns = {name: np.repeat([cell[name] for cell in full], seeds) for name in defaults}
    columns = {
        k: jnp.asarray(v, None if k == "landscape" else "float32") for k, v in columns.items()
    }
    which = jnp.tile(jnp.arange(seeds), len(cells))
    trace = _compiled(shape, algorithm, length, seeds)(jax.random.key(seed), which, columns)
    return jax.tree.map(lambda x: np.asarray(x).reshape(len(cells), seeds, -1), trace)


@functools.cache
def _compiled(shape: WorldShape, algorithm: Algorithm, length: Length, seeds: int):
    def one(key, which, cell):
        world_key, run_key = keys(key, which)
        world = make_world(world_key, shape, cell["landscape"], cell["coverage"])
        settings = Settings(**{name: cell[name] for name in SETTINGS})
        return run(run_key, world, algorithm, settings, length)

    def every(key, which, columns):
        # A divisor of the number of seeds, so that a cell's numbers do not depend on other cells.
        batch = max(n for n in range(1, BATCH + 1) if seeds % n == 0)
        return jax.lax.map(lambda x: one(key, *x), (which, columns), batch_size=batch)

    return jax.jit(every)


def keys(key, which):
    """Makes a seed's two random keys: one for its world, one for the noise of its runs."""
    return jax.random.split(jax.random.fold_in(key, which))
