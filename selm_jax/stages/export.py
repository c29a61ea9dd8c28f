"""The stage `export`: writes the new policy as a Hugging Face folder, and its adapters."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from selm_jax.models.lora import merge
from selm_jax.models.quantize import dequantize
from selm_jax.parallel import multihost
from selm_jax.run.inputs import Model, Training, Words
from selm_jax.shell import artifacts, mirror
from selm_jax.shell.words import redo
from selm_jax.stages.stage import Counts, stage
from selm_jax.stages.step import Step
from selm_jax.weights.export import export_folder
from selm_jax.weights.multimodal import is_in
from selm_jax.weights.peft import export_adapter


def _leaves(step: Step, **_given: Any) -> tuple[str, ...]:
    return ("model",) if step.settings.lora is None else ("model", "adapter")


@stage(
    settings=("lora", "training.parameter_dtype", "model.keep_vision"),
    leaves=_leaves,
    gives=lambda folder: Model(folder / "model", folder),
    shared=False,  # its checkpoints have no digest, so another run's export may differ
    ends=("checkpoints",),
)
def export(step: Step, policy: Model, start: Model, training: Training, card: Words) -> Counts:
    """Writes the trained parameters as a Hugging Face folder with tokenizer and model card.

    Args:
      policy: the model that the training started from.
      start: the run's start model, whose tokenizer and template the new policy keeps.
    """
    programs = step.programs
    checkpoints = training.checkpoints(policy)
    if not checkpoints.has_final:
        raise artifacts.ArtifactError(
            f"{checkpoints.folder}: the trained parameters are missing. To train this "
            f"iteration again: {redo(step.folder, 'train')}"
        )
    params = checkpoints.final(programs.abstract_trained)
    if (lora := programs.lora) is not None:
        with _folder(step.folder / "adapter") as partial:
            base, revision = policy.called
            inside = is_in(mirror.need(policy.path, ["config.json"]))
            export_adapter(params, programs.config, lora, base, partial, revision, inside=inside)
        merged = jax.jit(lambda base, adapters: merge(dequantize(base), adapters, lora))
        params = merged(programs.start_of(policy.path), params)
    with _folder_of_all(step.folder / "model") as (partial, part):
        export_folder(
            params, programs.config, start.path, partial,
            card.write() if multihost.is_first() else "",
            keep_vision=step.settings.model.keep_vision, part=part,
        )  # fmt: skip
    return {"parameters": programs.parameters}


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[Path | None]:
    """The folder that the first process writes to; None in the other processes.

    The others must run the same code, because it gathers the parameters, but they write nothing.
    """
    if multihost.is_first():
        with artifacts.whole(path, replaces_folder=True) as partial:
            yield partial
    else:
        yield None


@contextlib.contextmanager
def _folder_of_all(path: Path) -> Iterator[tuple[Path | None, tuple[int, int]]]:
    """The folder that this process writes to, and its part `(i, n)` of the files of weights.

    In a bucket, each process writes its part into a mirror of its own and puts it. On a disk the
    first process writes all: what others write there, it may see too late for its digest.
    """
    in_bucket = mirror.of(path)
    if in_bucket is None:
        with _folder(path) as partial:
            yield partial, (0, 1)
        return
    part = multihost.index(), multihost.count()
    if multihost.is_first():
        with artifacts.whole(path, replaces_folder=True) as partial:
            yield partial, part
    else:
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        yield path, part
    if multihost.count() == 1:
        return
    multihost.barrier()  # the first process has put its files in place of those of an earlier try
    mine = {} if multihost.is_first() else in_bucket.put_parts(path)
    told = multihost.on_every(lambda: mine)

    def learn() -> None:
        in_bucket.refresh(path)
        in_bucket.learn({key: known for each in told for key, known in each.items()})

    multihost.on_first(learn)
