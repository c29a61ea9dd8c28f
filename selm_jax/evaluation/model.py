"""Opens a model from a command-line argument: a run, a folder, a Hub id or a GGUF file.

model = open_model("runs/quickstart")
answers = model.reply(conversations, ...)
logps = model.logps(examples)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import jax
from rich.console import Console

from selm_jax.config import Experiment, Text, as_dict, fixed_length
from selm_jax.config import load as load_experiment
from selm_jax.config.kinds import Dtype
from selm_jax.evaluation import EvaluationError
from selm_jax.models.decoder import Params, abstract_params
from selm_jax.parallel.mesh import compute_dtype, decode_mesh, make_mesh
from selm_jax.parallel.rules import TRAINING, shardings
from selm_jax.policy.policy import Batches, Policy
from selm_jax.policy.sizes import KEYS, given, with_sizes
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
    """The location of a model that is named on the command line.

    Attributes:
      name: its name in tables and files: `RUN/iteration_3`, the folder's name, or the Hub id.
      source, revision: arguments for `weights.sources.resolve`.
      run: the run's folder if it is the model of a run; then `experiment` has the run's settings.
    """

    name: str
    source: str
    revision: str | None = None
    run: Path | None = None
    experiment: Experiment | None = None


def find(source: str, *, revision: str | None = None, iteration: int | None = None) -> Found:
    """Finds the model that an argument of the command line names.

    Args:
      source: a run folder, a model folder, a Hub id or a GGUF file.
      revision: the revision of a Hub id.
      iteration: for a run, use the model after this iteration (0: the start model); None: the last.

    Raises:
      EvaluationError: the run has no such model, or an iteration was given for something else.
    """
    path = place(source)
    if not (path / "manifest.json").is_file() or (path / "config.json").is_file():
        if iteration is not None:
            raise EvaluationError(
                f"{source} is not a run folder (it has no manifest.json), so it has no iteration "
                f"{iteration}. Leave the iteration out"
            )
        if path.name == "model" and path.parent.name.startswith("iteration_"):
            return Found(f"{path.parent.parent.name}/{path.parent.name}", source)
        return Found(path.name if path.exists() else source, source, revision)
    experiment = load_experiment(path / "config.yaml")
    if len(given(as_dict(experiment))) < len(KEYS):
        manifest = artifacts.read_sealed(path / "manifest.json")
        experiment = with_sizes(experiment, manifest.get("sizes", {}))
    there = [0, *_exported(path)]
    t = there[-1] if iteration is None else iteration
    if t not in there or there == [0] and iteration is None:
        raise EvaluationError(
            f"{source}: there is no model of iteration {1 if iteration is None else t}; finished "
            f"iterations: {', '.join(map(str, there))} (0 is the start model). "
            "Continue the run with `selm run`"
        )
    if t == 0:
        model = experiment.model
        return Found(f"{path.name}/start", model.source, model.revision, path, experiment)
    model = path / f"iteration_{t}" / "model"
    return Found(f"{path.name}/iteration_{t}", str(model), None, path, experiment)


def _exported(run: Path) -> list[int]:
    """The iterations of a run whose exported model is complete, in order."""
    return [
        t
        for t, folder in artifacts.iterations(run).items()
        if artifacts.Stages(folder).read().get("export", {}).get("done")
    ]


def open_model(
    source: str, *, revision: str | None = None, iteration: int | None = None, **how: Any
) -> Model:
    """Finds and opens the model that an argument names; for `how` see `open_found`."""
    return open_found(find(source, revision=revision, iteration=iteration), **how)


def open_found(
    found: Found,
    *,
    text: Text | None = None,
    dtype: str = "auto",
    tensor: int = 1,
    slots: int | None = None,
    as_in: Experiment | None = None,
    console: Console | None = None,
) -> Model:
    """Opens a model that `find` has found. Its weights are read when they are first needed.

    Args:
      text: settings of the chat template; None: the run's own, if it is the model of a run.
      dtype: dtype of parameters and computation: auto (float32 on CPU, else bfloat16), float32 or
        bfloat16.
      tensor: how many devices share each matrix; the others share rows and parameters.
      slots: how many answers are generated together; None chooses it from memory.
      as_in: settings of a run whose row sizes and parameter dtype are used, so that
        log-probabilities equal the run's to the bit. None: rows that fit lengths and devices.

    Raises:
      EvaluationError: the dtype is unknown.
      SourceError: there is no such model.
    """
    if dtype not in get_args(Dtype):
        raise EvaluationError(f"dtype is {dtype!r}; expected one of {', '.join(get_args(Dtype))}")
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


def _batches(slots: int | None, as_in: Experiment | None) -> Batches:
    found = Batches(slots)
    if as_in is None:
        return found
    t = as_in.training
    if t.rows == "auto" or t.logprob_chunk == "auto":  # not of a run that has begun
        return found
    row_length = fixed_length(t.row_length)
    return dataclasses.replace(found, rows=t.rows, row_length=row_length, chunk=t.logprob_chunk)


class Model(Policy):
    """A language model, opened by `open_model`, that answers prompts and scores responses.

    Attributes:
      found: the result of `find`.
      folder: its files; `folder.origin` identifies their bytes.
      text: settings of the chat template.
      console: the terminal for progress bars.
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
        """Use `open_found` instead. `held` is the parameters' dtype if it is not `dtype`."""
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
            say=partial(console.print, soft_wrap=True, markup=False, highlight=False),
        )  # fmt: skip

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer, for use without a chat template."""
        return Tokenizer(self.folder.path)
