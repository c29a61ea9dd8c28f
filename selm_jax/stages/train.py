"""train and export: the updates (checkpoints/), and the new policy (model/)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import jax

from selm_jax.models.lora import merge
from selm_jax.models.quantize import dequantize
from selm_jax.parallel import multihost
from selm_jax.run.rows import RunError
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.shell.store import Store
from selm_jax.stages.generate import Counts
from selm_jax.tables import examples as table
from selm_jax.training.checkpoint import Checkpoints
from selm_jax.training.loop import TrainingPlan, train
from selm_jax.training.state import TrainState
from selm_jax.weights.export import export_folder
from selm_jax.weights.peft import export_adapter


def train_policy(run: Run, t: int) -> Counts:
    """Updates from the start policy, or from the last checkpoint of this stage."""
    e = run.experiment
    plan = plan_of(run, t)
    run.folder.forget(lambda line: False)  # but what a kill tore
    checkpoints = checkpoints_of(run, t)
    if not checkpoints.has_final:
        start = run.programs.start_of(run.policy(t - 1))
        state = TrainState.create(run.programs.trained(start, t), run.programs.optimizer)
        state = checkpoints.latest(state) or state
        fixed = run.programs.fixed(start, t, run.policy(t - 1), run.reference(t))
        del start
        run.folder.forget(
            lambda m: (
                m["stage"] == "train"
                and (m["iteration"] > t or (m["iteration"] == t and m["step"] > int(state.step)))
            )
        )
        with run.bar(f"iteration {t}  train", len(plan.updates), "updates") as advance:
            advance(int(state.step), 0)

            def report(metrics):
                run.folder.log("train", t, metrics)
                advance(1, metrics["tokens"])

            with multihost.stop_deferred():
                state = train(
                    plan, run.programs.update, state, checkpoints,
                    peak=e.learning_rate(t), place=run.programs.place, report=report, **fixed,
                )  # fmt: skip
        del fixed
        checkpoints.save_final(state.params, int(state.step))
    return plan.counts()


def checkpoints_of(run: Run, t: int) -> Checkpoints:
    """Those of iteration t, which mean nothing without the model that it starts from.

    Raises:
      ArtifactError: the reference's log-probabilities are those of another model.
    """

    def start() -> str:
        if not run.task.reference_free:
            _check_reference(run, t)
        return artifacts.digest(run.policy(t - 1))

    def logged(step: int) -> str:
        lines = run.folder.logged("train", t)
        if lines:
            artifacts.flush(
                run.folder.metrics_file
            )  # a checkpoint is not to outlive what it tells of
        return Store.key(lines=[line for line in lines if line["step"] <= step])

    return Checkpoints(
        run.folder.iteration(t) / "checkpoints",
        start=multihost.on_first(start),
        keep=run.experiment.training.checkpoints_kept,
        logged=logged,
    )


def _check_reference(run: Run, t: int) -> None:
    """Raises ArtifactError if log-probabilities that iteration t is trained on are another model's."""
    examples = run.folder.iteration(t) / "examples.parquet"
    for scored, folder, what in (
        (
            table.reference_of(examples),
            run.reference(t),
            "the reference's log-probabilities are those of",
        ),
        (
            table.start_of(examples),
            run.policy(t - 1),
            "it was scored in an iteration that starts from",
        ),
    ):
        if scored not in ("", now := artifacts.digest(folder)):
            raise artifacts.ArtifactError(
                f"{examples}: {what} the model with digest {scored}; {folder} has {now}. Put that "
                f"model back, or remove 'score' from {run.folder.iteration(t) / 'stage.json'} to score "
                "this iteration again"
            )


def plan_of(run: Run, t: int) -> TrainingPlan:
    """The updates of iteration t, from its examples.

    Raises:
      RunError: an example lacks a role, or the reference's score, that the objective needs.
    """
    examples = table.read(run.folder.iteration(t) / "examples.parquet")
    stored = run.experiment.training.reference == "stored" and not run.task.reference_free
    for example in examples:
        if absent := set(run.task.objective.roles) - set(example.roles):
            raise RunError(
                f"{run.task.objective} needs the roles {', '.join(run.task.objective.roles)}; prompt "
                f"{example.prompt_id} has no {', '.join(sorted(absent))}"
            )
        if stored and example.reference is None:
            raise RunError(
                f"{run.task.objective} needs the reference's log-probabilities; prompt "
                f"{example.prompt_id} has none. Remove 'score' from "
                f"{run.folder.iteration(t) / 'stage.json'} to score this iteration again"
            )
    e = run.experiment
    return TrainingPlan.make(e.training, examples, e.seed, t)


def export(run: Run, t: int) -> Counts:
    """The trained parameters as a Hugging Face folder, complete with tokenizer and card."""
    checkpoints = checkpoints_of(run, t)
    if not checkpoints.has_final:
        raise artifacts.ArtifactError(
            f"{checkpoints.folder}: the trained parameters are missing. Remove 'train' from "
            f"{run.folder.iteration(t) / 'stage.json'} to train this iteration again"
        )
    params = checkpoints.final(run.programs.abstract_trained)
    if (lora := run.programs.lora) is not None:
        with _folder(run.folder.iteration(t) / "adapter") as partial:
            base, revision = _base(run, t)
            export_adapter(params, run.programs.config, lora, base, partial, revision)
        merged = jax.jit(lambda base, adapters: merge(dequantize(base), adapters, lora))
        params = merged(run.programs.start_of(run.policy(t - 1)), params)
    with _folder(run.folder.iteration(t) / "model") as partial:
        card = run.folder.model_card(t, run.start.origin, run.task.rates) if partial else ""
        export_folder(params, run.programs.config, run.start.path, partial, card)
    return {"parameters": run.programs.parameters}


def _base(run: Run, t: int) -> tuple[str, str | None]:
    """What the model that iteration t's adapters belong to is called where they are used, and its
    commit if it came from the Hub: never by the place where this machine keeps it."""
    if t > 1:
        return str(run.policy(t - 1)), None
    return run.start.origin["source"], run.start.origin.get("commit")


@contextlib.contextmanager
def _folder(path: Path) -> Iterator[Path | None]:
    """Where the first process writes; the others go through the same motions, which bring the
    parameters to it, and write nothing: None."""
    if multihost.is_first():
        with artifacts.whole(path, replaces_folder=True) as partial:
            yield partial
    else:
        yield None
