"""Runs as the command line names them: by an experiment file, or by their folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import jax

from selm_jax import config
from selm_jax.parallel import multihost
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.weights.sources import cache_root


def opened(
    file: Path,
    overrides: Sequence[config.Override] | None,
    *,
    tiny: bool = False,
    processes: bool = False,
    imports: bool = True,
) -> Run:
    """The run of an experiment file.

    Args:
      tiny: it is a rehearsal, with a tiny random model and made-up rows.
      processes: together with those that run beside.
      imports: functions of the user's that it names are imported when they are needed.
    """
    experiment = config.load(file, overrides or [])
    set_up_jax()
    if processes:
        multihost.initialize()
    if tiny:
        from selm_jax.commands.tiny import shrink
        from selm_jax.shell.progress import terminal

        experiment = shrink(experiment, terminal(quiet=not multihost.is_first()))
    return Run(experiment, imports=imports)


def finished(folder: Path) -> Run:
    """The run in a folder, wherever the folder is now, to be looked at: none of its code is imported."""
    experiment = config.load(folder / "config.yaml")
    experiment = dataclasses.replace(experiment, output=str(folder))
    set_up_jax()
    return Run(experiment, imports=False)


def last_generated(folder: Path) -> int:
    """The last iteration whose answers are there. Raises ArtifactError if none is."""
    done = [
        t
        for t, each in artifacts.iterations(folder).items()
        if artifacts.Stages(each).read().get("generate", {}).get("done")
    ]
    if not done:
        raise artifacts.ArtifactError(
            f"{folder}: no iteration has answers yet; `selm generate` makes them"
        )
    return max(done)


def set_up_jax() -> None:
    """What is compiled once is not compiled again, in this run or the next."""
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # restarts add them up
    # Of two programs in flight on forced CPU devices, each can hold the threads that the other's
    # collectives wait for; on other platforms this setting does nothing.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
