"""Opens runs that are named on the command line by an experiment file or a run folder."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path

import jax

from selm_jax import config
from selm_jax.config import Experiment
from selm_jax.parallel import multihost
from selm_jax.run.run import Run
from selm_jax.shell import artifacts, compiling
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.memory import share_one_heap
from selm_jax.shell.progress import talks, terminal
from selm_jax.shell.storage import is_url
from selm_jax.weights.sources import cache_root


def settings_of(place: Path, overrides: Sequence[config.Override] = ()) -> Experiment:
    """Reads the experiment of a YAML file or a run folder; `output` is then that folder.

    Raises:
      ConfigError: as `config.load`; or the folder is not a run folder.
    """
    if not place.is_dir():
        return config.load(place, overrides)
    file = mirrors.look(place) / "config.yaml"
    if not file.exists():
        raise config.ConfigError(
            f"{place}: this folder has no config.yaml, so it is not a run folder. Give an "
            "experiment file (YAML) or a run folder"
        )
    return config.load(file, [("output", mirrors.named(place)), *overrides])


def opened(
    place: Path,
    overrides: Sequence[config.Override] | None,
    *,
    tiny: bool = False,
    processes: bool = False,
) -> Run:
    """Opens the run of an experiment file or run folder, to continue it.

    Args:
      tiny: rehearse it with a tiny random model and made-up rows.
      processes: work together with the other processes of this run.
    """
    experiment = settings_of(place, overrides or [])
    set_up_jax()
    if processes:
        multihost.initialize()
    if tiny:
        experiment = _rehearsal(experiment)
    quiet = talks().quiet or not multihost.is_first()
    gc.freeze()  # what is imported stays: each stage would spend half a second on looking for it
    return Run(experiment, terminal(quiet=quiet))


def looked_at(place: Path, overrides: list[str] | None, *, tiny: bool = False) -> Run:
    """Opens the run of an experiment file or run folder for a command that only shows it.

    Functions that an experiment file names are imported, as `selm run` does. Those that a run
    folder names are not: the folder may be somebody else's.
    """
    experiment = settings_of(place, overrides or [])
    set_up_jax()
    if tiny:
        experiment = _rehearsal(experiment)
    if is_url(experiment.output):
        mirrors.look(mirrors.local(experiment.output))
    return Run(experiment, terminal(), imports=not (place.is_dir() or place.name == "config.yaml"))


def _rehearsal(experiment: Experiment) -> Experiment:
    from selm_jax.commands.tiny import shrink

    return shrink(experiment, terminal(quiet=talks().quiet or not multihost.is_first()))


def finished(folder: Path) -> Run:
    """Opens the run in a folder, even a moved folder, without importing the user's code."""
    experiment = settings_of(folder)
    set_up_jax()
    return Run(experiment, imports=False)


def last_generated(folder: Path) -> int:
    """The last iteration of a run with generated answers. Raises ArtifactError if there is none."""
    done = [
        t
        for t, each in artifacts.iterations(folder).items()
        if artifacts.Stages(each).read().get("generate", {}).get("done")
    ]
    if not done:
        raise artifacts.ArtifactError(
            f"{folder}: no iteration has answers yet; run `selm generate` first"
        )
    return max(done)


def set_up_jax() -> None:
    """Makes JAX keep compiled programs on disk, so that later runs need not compile them again."""
    share_one_heap()
    jax.config.update("jax_compilation_cache_dir", str(cache_root() / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)  # restarts add them up
    # Of two programs in flight on forced CPU devices, each can hold the threads that the other's
    # collectives wait for; on other platforms this setting does nothing.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    compiling.watch(_say_compiled)


def _say_compiled(line: str) -> None:
    if talks().verbose:
        terminal(stderr=True).print(line, style="dim", highlight=False)
