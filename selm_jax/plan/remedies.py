"""Finds settings with which an experiment fits into device memory, by compiling it.

These settings do not change the results, apart from rounding: the number of rows, slots or logits
computed together, what the backward pass recomputes, whether the reference is stored, and how the
model is sharded. They are tried from the cheapest to the most expensive, alone, then together.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence

from selm_jax.config import Experiment, Feedback
from selm_jax.feedback.models.settings import checked_batch
from selm_jax.parallel.mesh import MeshError
from selm_jax.plan.phases import GENERATE, RANK, SCORE, TRAIN
from selm_jax.plan.rankers import MODELS
from selm_jax.policy.sizes import BatchSizes

Change = tuple[str, ...]  # overrides, `key=value`
Fits = Callable[[Change, str | None], bool]  # whether a stage (None: all) fits with these changes


def remedy(
    experiment: Experiment,
    sizes: BatchSizes,
    stages: Sequence[str],
    devices: int,
    longest: int,
    fits: Fits,
) -> Change | None:
    """Finds changes with which all `stages` fit into memory; None if no known change is enough.

    Args:
      sizes: the sizes of its batches.
      stages: the stages that do not fit.
      devices: number of devices in the mesh.
      longest: number of tokens of the longest example.
      fits: compiles a stage with changes and says whether it fits. It may raise MeshError for a
        change that the model's shape does not allow.
    """
    found: Change = ()
    for stage in stages:
        more = _of_stage(
            list(_ladder(experiment, sizes, stage, devices, longest)), found, stage, fits
        )
        if more is None:
            return None
        found = _replaced(found, more)
    return found


def _replaced(old: Change, new: Change) -> Change:
    """Merges two changes; if both change a setting, the new value wins."""
    keys = {each.partition("=")[0] for each in new}
    return (*(each for each in old if each.partition("=")[0] not in keys), *new)


def _of_stage(ladder: list[Change], so_far: Change, stage: str, fits: Fits) -> Change | None:
    def allowed(change: Change) -> bool:
        try:
            return fits(_replaced(so_far, change), stage)
        except MeshError:
            return False

    if so_far and allowed(()):
        return ()
    for change in ladder:
        if allowed(change):
            return change
    together: Change = ()
    for i, change in enumerate(ladder):
        together = _replaced(together, change)
        if i and allowed(together):
            return together
    return None


def _ladder(
    e: Experiment, sizes: BatchSizes, stage: str, devices: int, longest: int
) -> Iterator[Change]:
    """Yields changes to try for a stage, beginning with cheap settings and small changes."""
    c, t = e.compute, e.training
    if stage == RANK:
        yield from _smaller_batches(e.feedback)
    if stage == GENERATE:
        copies = devices // (c.decode_tensor or c.tensor)
        yield from _halved("rollout.prefill_rows", sizes.prefill_rows, copies)
        yield from _halved("rollout.slots", sizes.slots, copies)
        for tensor in _powers(2 * (c.decode_tensor or c.tensor), devices):
            yield (f"compute.decode_tensor={tensor}",)
    if stage in (SCORE, TRAIN):
        if stage == TRAIN and t.reference == "live":
            yield ("training.reference=stored",)
        if sizes.chunk > 32:
            yield ("training.logprob_chunk=32",)
        yield from _halved("training.rows", sizes.rows, devices // c.tensor)
        length = math.ceil(longest / 128) * 128
        if t.row_length == "auto" or length < t.row_length:
            yield (f"training.row_length={length}",)
        if stage == TRAIN and sizes.remat != "full":
            yield ("training.remat=full",)
        for tensor in _powers(2 * c.tensor, devices):
            rows = min(sizes.rows, devices // tensor)
            yield (f"compute.tensor={tensor}", "compute.fsdp=-1", f"training.rows={rows}")


def _smaller_batches(f: Feedback) -> Iterator[Change]:
    """Yields smaller batches of the ranker; in a mixture, all models get smaller batches."""
    if f.ranker != "mixture":
        batch = checked_batch(f.ranker, f.settings.get("batch"), on_cpu=False)
        while (batch := batch // 2) >= 1:
            yield (f"feedback.settings.batch={batch}",)
        return
    parts = [dict(part) for part in f.settings.get("parts", [])]
    models = [part for part in parts if part["ranker"] in MODELS]
    batches = [
        checked_batch(part["ranker"], part.get("settings", {}).get("batch"), on_cpu=False)
        for part in models
    ]
    while max(batches, default=1) > 1:
        batches = [max(1, batch // 2) for batch in batches]
        for part, batch in zip(models, batches, strict=True):
            part["settings"] = {**part.get("settings", {}), "batch": batch}
        yield (f"feedback.settings.parts={json.dumps(parts)}",)  # a key path cannot enter a list


def _halved(key: str, value: int, least: int) -> Iterator[Change]:
    while value > least:
        value = max(least, value // 2 // least * least)
        yield (f"{key}={value}",)


def _powers(first: int, most: int) -> Iterator[int]:
    while first <= min(most, 8):
        yield first
        first *= 2
