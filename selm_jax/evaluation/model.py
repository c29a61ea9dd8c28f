"""A name on the command line as a policy: the last model of a run, a folder, a Hub id, a GGUF file.

model = open_model("runs/quickstart")
answers = model.reply(conversations, ...)
logps = model.logps(examples)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import jax
from rich.console import Console

from selm_jax.config import Experiment, Text
from selm_jax.config import load as load_experiment
from selm_jax.config.kinds import Dtype
from selm_jax.evaluation import EvaluationError
from selm_jax.models.decoder import Params, abstract_params
from selm_jax.parallel.mesh import compute_dtype, decode_mesh, make_mesh
from selm_jax.parallel.rules import TRAINING, shardings
from selm_jax.policy.policy import Batches, Policy
from selm_jax.shell import artifacts
from selm_jax.shell.paths import place
from selm_jax.shell.progress import terminal
from selm_jax.text.chat import Chat
from selm_jax.text.tokenizer import Tokenizer
from selm_jax.text.vocabulary import stop_ids
from selm_jax.weights import sources
from selm_jax.weights.huggingface import checked_config, load


@dataclass(frozen=True)
class Found:
    """What a name on the command line stands for.

    Attributes:
      name: for tables and files: `RUN/iteration_3`, the folder's name, or the Hub id.
      source, revision: for `weights.sources.resolve`.
      run: the run's folder, if it is the model of a run, and `experiment` its settings.
    """

    name: str
    source: str
    revision: str | None = None
    run: Path | None = None
    experiment: Experiment | None = None


def find(source: str, *, revision: str | None = None, iteration: int | None = None) -> Found:
    """What a name stands for.

    Args:
      source: a run folder, a model folder, a Hub id or a GGUF file.
      revision: of a Hub id.
      iteration: of a run: its model after this iteration, 0 for its start; None: its last model.

    Raises:
      EvaluationError: a run without such a model, or an iteration of something else.
    """
    path = place(source)
    if not (path / "manifest.json").is_file() or (path / "config.json").is_file():
        if iteration is not None:
            raise EvaluationError(
                f"{source} is no run folder (no manifest.json there): it has no iteration "
                f"{iteration}. Leave the iteration out"
            )
        if path.name == "model" and path.parent.name.startswith("iteration_"):
            return Found(f"{path.parent.parent.name}/{path.parent.name}", source)
        return Found(path.name if path.exists() else source, source, revision)
    experiment = load_experiment(path / "config.yaml")
    there = [0, *_exported(path)]
    t = there[-1] if iteration is None else iteration
    if t not in there or there == [0] and iteration is None:
        raise EvaluationError(
            f"{source}: no model of iteration {1 if iteration is None else t}; finished are "
            f"{', '.join(map(str, there))} (0 is the start model). `selm run` goes on from there"
        )
    if t == 0:
        model = experiment.model
        return Found(f"{path.name}/start", model.source, model.revision, path, experiment)
    model = path / f"iteration_{t}" / "model"
    return Found(f"{path.name}/iteration_{t}", str(model), None, path, experiment)


def _exported(run: Path) -> list[int]:
    """The iterations of a run whose model is whole, in order."""
    return [
        t
        for t, folder in artifacts.iterations(run).items()
        if artifacts.Stages(folder).read().get("export", {}).get("done")
    ]


def open_model(
    source: str, *, revision: str | None = None, iteration: int | None = None, **how: Any
) -> Model:
    """The model that `find` finds; for `how` see `open_found`."""
    return open_found(find(source, revision=revision, iteration=iteration), **how)


def open_found(
    found: Found,
    *,
    text: Text | None = None,
    dtype: str = "auto",
    tensor: int = 1,
    slots: int = 16,
    as_in: Experiment | None = None,
    console: Console | None = None,
) -> Model:
    """Makes a model ready. Its weights are read when they are first needed.

    Args:
      text: what the chat template reads besides the messages; None: as the run's settings say.
      dtype: of parameters and computation: auto (float32 on CPU, else bfloat16), float32, bfloat16.
      tensor: devices that share each matrix; the others share rows and parameters.
      slots: answers that are drawn together.
      as_in: the settings of a run, whose packed rows and whose dtype of parameters are taken, so that
        log-probabilities are the run's own to the bit. None: rows as they fit lengths and devices.

    Raises:
      EvaluationError: an unknown dtype.
      SourceError: there is no such model.
    """
    if dtype not in get_args(Dtype):
        raise EvaluationError(f"dtype {dtype!r} is not one of {', '.join(get_args(Dtype))}")
    console = console or terminal(stderr=True)
    if text is None:
        text = found.experiment.text if found.experiment else Text()
    mesh = make_mesh((1, -1, tensor))
    return Model(
        found, sources.resolve(found.source, revision=found.revision, progress=console),
        text=text, mesh=mesh, dtype=compute_dtype(dtype, mesh.devices.flat[0].platform),
        held=None if as_in is None else as_in.training.parameter_dtype,
        batches=_batches(slots, as_in), console=console,
    )  # fmt: skip


def _batches(slots: int, as_in: Experiment | None) -> Batches:
    found = Batches(slots, prefill_rows=min(8, slots))
    if as_in is None:
        return found
    t = as_in.training
    rows = {"rows": t.rows, "row_length": t.row_length, "chunk": t.logprob_chunk}
    return dataclasses.replace(found, **rows)


class Model(Policy):
    """A policy that `open_model` made of a name.

    Attributes:
      found: see `find`.
      folder: its files, and `folder.origin`, which pins their bytes.
      text: what the chat template reads besides the messages.
      console: where progress is shown.
    """

    def __init__(
        self,
        found: Found,
        folder: sources.ModelFolder,
        *,
        text: Text,
        mesh: jax.sharding.Mesh,
        dtype: Any,
        held: str | None,
        batches: Batches,
        console: Console,
    ):
        """`open_found` makes one. `held` is the dtype of the parameters, if it is not `dtype`."""
        self.found, self.folder, self.text, self.console = found, folder, text, console
        config = checked_config(folder.path)

        def read() -> Params:
            where = shardings(abstract_params(config), mesh, TRAINING)
            return load(folder.path, config, dtype=held or dtype, shardings=where)

        super().__init__(
            found.name, read, config,
            chat=lambda: Chat(folder.path, text, config.vocab_size),
            stop_ids=lambda: stop_ids(folder.path, self.tokenizer, config.vocab_size),
            mesh=mesh, decode_mesh=decode_mesh(mesh, mesh.shape["tensor"]), dtype=dtype,
            batches=batches,
        )  # fmt: skip

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Of any model, whether or not it has a chat template."""
        return Tokenizer(self.folder.path)
