"""Checks memory: before any work is done, and when a device has run out of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax

from selm_jax.models.quantize import quantize
from selm_jax.policy.sizes import KEYS, LEAST, BatchSizes, Generation, Training
from selm_jax.run.programs import Programs
from selm_jax.run.rows import RunError
from selm_jax.shell.memory import (
    device_limit,
    free_memory,
    gib,
    held_now,
    shard_bytes,
)
from selm_jax.training.state import TrainState

# What makes a stage need less, from the cheapest setting to the most expensive.
_SMALLER = {
    "generate": ("rollout.prefill_rows", "rollout.slots"),
    "evaluate": ("rollout.prefill_rows", "rollout.slots"),
    "score": ("training.rows", "training.logprob_chunk"),
    "train": ("training.rows", "training.logprob_chunk"),
}


# A margin for what the estimate does not count. Without it the quickstart needs 2.7 GiB by the
# estimate if an update is one batch, and took 2.8.
MARGIN = 2**28
_LESS = {
    "train": "Train adapters (`lora`), set training.parameter_dtype: bfloat16, or shorten the rows "
    "(training.row_length)",
    "generate": "Shorten the prompts or the answers (rollout.max_prompt_tokens, "
    "rollout.max_new_tokens)",
}
_SHORTER = "shorten the answers (rollout.max_new_tokens), or use a machine with more memory"
_OTHERWISE = {
    "generate": _SHORTER, "evaluate": _SHORTER, "score": "use a machine with more memory",
    "train": "train adapters (`lora`), or use a machine with more memory",
}  # fmt: skip


class OutOfMemory(RuntimeError):
    """A stage needs more memory than a device has."""


def check_memory(programs: Programs) -> Iterator[str]:
    """Checks that what training must hold fits into memory, and yields notes if it is tight.

    Only parameters, gradients and moments count, which are known without compiling anything, so
    an experiment that passes can still need too much.

    Raises:
      RunError: training cannot fit on these devices.
    """
    device = jax.local_devices()[0]
    parts = least_of_training(programs)
    needed, (limit, source) = sum(parts.values()), device_limit(device)
    listed = ", ".join(f"{name} {gib(size)}" for name, size in parts.items())
    least = f"training needs at least {gib(needed)} GiB of memory per device ({listed})"
    if needed > limit:
        raise RunError(
            f"{least} and more for activations, but there are {gib(limit)} GiB ({source}): "
            f"{gib(needed - limit)} GiB are missing. Train adapters (`lora`), set "
            "training.parameter_dtype: bfloat16, or shard the model over more devices "
            "(compute.fsdp)"
        )
    if device.platform != "cpu":
        return  # where memory that runs out is an error, and not the end of the process
    free = free_memory()
    if free is not None and needed > free // len(jax.local_devices()):
        yield f"{least}, but {gib(free)} GiB are free on this machine now. Close other programs"
    elif needed > 0.6 * limit:
        yield (
            f"{least} of {gib(limit)} ({source}), and more for activations. The system may kill "
            "the run without a message: check with `selm plan` first"
        )


def check_estimate(
    stage: str, of: Generation | Training, sizes: BatchSizes, least: BatchSizes
) -> Iterator[str]:
    """Checks on a CPU that the estimate of a stage fits; yields a note if only other sizes would.

    A CPU's memory that runs out ends the process without a message.

    Args:
      of: what the stage needs.
      sizes: the sizes of its batches.
      least: the least sizes, in place of those that are given too.

    Raises:
      RunError: not even the least sizes fit.
    """
    device = jax.local_devices()[0]
    if device.platform != "cpu":
        return
    limit, source = device_limit(device)
    mine = (held_now() + MARGIN) // len(jax.local_devices())

    def needed(sizes: BatchSizes) -> int:
        return mine + of.total(sizes)

    least = min(least, sizes, key=needed)
    if needed(least) > limit:
        raise RunError(
            f"by the estimate, {stage} needs {gib(needed(least))} GiB of memory with the least "
            f"sizes of batches ({gib(mine)} of them for this process and a margin), but there "
            f"are {gib(limit)} GiB ({source}): {gib(needed(least) - limit)} GiB are missing. "
            f"{_LESS[stage]}, or use a machine with more memory"
        )
    if needed(sizes) > limit:
        listed = ", ".join(f"{KEYS[name]} {getattr(sizes, name)}" for name in of.needs(sizes))
        yield (
            f"by the estimate, {stage} needs {gib(needed(sizes))} GiB of memory with {listed}, but "
            f"there are {gib(limit)} GiB ({source}). The system may kill the run without a "
            "message: leave these settings out, and they are chosen"
        )


def least_of_training(programs: Programs) -> dict[str, int]:
    """The bytes that training holds on one device, without activations, by what they are."""
    trained = programs.abstract_trained
    state = TrainState.abstract(trained, programs.optimizer)
    found = {
        "parameters": shard_bytes(trained),
        "gradients": shard_bytes(trained),
        "moments": shard_bytes(state.opt_state),
    }
    model, kind = programs.abstract_params, programs.quantized
    if kind is not None:  # the compiler chooses its shards, of which none is smaller than this
        whole = shard_bytes(jax.eval_shape(lambda params: quantize(params, kind), model))
        found["base model"] = whole // programs.devices.mesh.size
    elif programs.lora is not None:
        found["base model"] = shard_bytes(model)
    elif programs.experiment.training.reference == "live":
        found["reference"] = shard_bytes(model)
    return found


def out_of_memory(error: Exception, stage: str, folder: Path, advice: str) -> OutOfMemory:
    """The error of a stage that ran out of memory; `folder` is the iteration's."""
    words = str(error).strip().partition("\n")[0] or "MemoryError"
    return OutOfMemory(f"{folder}: stage {stage!r} ran out of memory ({words}). {advice}")


_CONTINUE = "Finished work is kept: the same command continues"


def advice(stage: str, sizes: BatchSizes) -> str:
    """Says which settings of a stage to change after it ran out of memory with these sizes."""
    if stage == "train" and sizes.remat != "full":
        return f"Set training.remat: full. {_CONTINUE}"
    if stage == "rank":
        return f"Set a smaller batch for the ranker (feedback.settings). {_CONTINUE}"
    if stage not in _SMALLER:
        return f"Close other programs, or use a machine with more memory. {_CONTINUE}"
    values = {key: getattr(sizes, name) for name, key in KEYS.items()}
    least = {key: getattr(LEAST, name) for name, key in KEYS.items()}
    if all(values[key] <= least[key] for key in _SMALLER[stage]):
        return f"Its batches are as small as they can be: {_OTHERWISE[stage]}. {_CONTINUE}"
    lower = ", ".join(f"{key} (now {values[key]})" for key in _SMALLER[stage])
    found = f"Lower {lower}; `selm plan` finds settings that fit. "
    if stage in ("score", "train"):
        return found + "Finished stages depend on these settings, so set another `output`, too"
    return found + _CONTINUE
