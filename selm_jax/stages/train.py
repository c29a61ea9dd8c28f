"""The stage `train`: trains the policy, or continues from its last checkpoint (checkpoints/)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from selm_jax.parallel import multihost
from selm_jax.preferences.novelty import with_bonuses
from selm_jax.run.inputs import Model, StoredTable, Training
from selm_jax.run.programs import iteration_key
from selm_jax.run.rows import RunError
from selm_jax.shell import artifacts
from selm_jax.shell.memory import release
from selm_jax.shell.words import redo
from selm_jax.stages.stage import Counts, stage
from selm_jax.stages.step import Step
from selm_jax.tables import examples as table
from selm_jax.training import loop
from selm_jax.training.state import TrainState
from selm_jax.training.work import Speed


@stage(
    settings=("seed", "objective", "training", "lora", "compute.dtype"),
    gives=Training,
    shared=False,  # its checkpoints are deleted once the export is complete
    goes_on_from=("checkpoints",),
)
def train(step: Step, policy: Model, examples: StoredTable, reference: Model) -> Counts:
    """Trains the policy on the examples with the objective."""
    programs = step.programs
    plan = plan_of(step, examples)
    if not step.task.reference_free:
        multihost.on_first(lambda: check_reference(examples, policy, reference))
    kept = step.settings.training.checkpoints_kept
    checkpoints = Training(step.folder).checkpoints(policy, kept)
    if not checkpoints.has_final:
        stored = step.settings.training.reference == "stored"
        if not step.plenty and stored and programs.lora is None:
            like = TrainState.abstract(programs.abstract_trained, programs.optimizer)
            loop.compile_ahead(plan, programs.update_at(step.t), like, programs.place)
            release()
        start = programs.start_of(policy.path)
        key = iteration_key(step.settings.seed, step.t)
        state = TrainState.create(programs.trained(start, key), programs.optimizer)
        state = checkpoints.latest(state) or state
        fixed = programs.fixed(start, key, policy.path, reference.path)
        del start
        step.log.forget_after(int(state.step))
        with step.bar(len(plan.updates), "updates") as advance:
            advance(int(state.step), 0)

            def report(metrics: Mapping[str, Any]) -> None:
                step.log(metrics)
                advance(1, metrics["tokens"])
                if metrics.get("skipped"):
                    step.say(_skipped(metrics["step"], plan))

            with multihost.stop_deferred():
                state = loop.train(
                    plan, programs.update_at(step.t), state, checkpoints,
                    peak=step.settings.training.peak(step.t), speed=speed_of(step),
                    place=programs.place, report=report, **fixed,
                )  # fmt: skip
        del fixed
        checkpoints.save_final(state.params, int(state.step))
    return plan.counts() | _counted(step)


def _skipped(number: int, plan: loop.TrainingPlan) -> str:
    ids = ", ".join(e.prompt_id for e in plan.updates[number - 1][:8])
    return (
        f"update {number} is skipped: its loss or gradient is not finite. Its first prompts: {ids}"
    )


def _counted(step: Step) -> Counts:
    """Counts the updates that were skipped, if the experiment skips any."""
    if step.settings.training.on_nonfinite == "stop":
        return {}
    lines = multihost.on_first(step.log.lines)
    return {"skipped": sum(int(line.get("skipped", 0)) for line in lines)}


def speed_of(step: Step) -> Speed:
    """Collects the facts from which the speed of this iteration's updates is computed."""
    programs, live = step.programs, step.settings.training.reference == "live"
    return Speed(programs.config, programs.devices.peak, programs.lora is not None, live)


def check_reference(examples: StoredTable, policy: Model, reference: Model) -> None:
    """Raises ArtifactError if the examples' log-probabilities come from another model."""
    for scored, model, what in (
        (
            table.reference_digest(examples.path),
            reference,
            "the reference log-probabilities come from",
        ),
        (
            table.start_digest(examples.path),
            policy,
            "it was written in an iteration that starts from",
        ),
    ):
        if scored not in ("", now := model.digest):
            raise artifacts.ArtifactError(
                f"{examples.path}: {what} the model with digest {scored}, but {model.path} has "
                f"{now}. Restore that model, or score this iteration again: "
                f"{redo(examples.folder, 'score')}"
            )


def plan_of(step: Step, examples: StoredTable) -> loop.TrainingPlan:
    """Plans the updates of an iteration from its examples.

    Raises:
      RunError: an example lacks a role or a reference log-probability that the objective needs.
    """
    found, objective = table.read(examples.path), step.task.objective
    stored = step.settings.training.reference == "stored" and not step.task.reference_free
    for example in found:
        if absent := set(objective.roles) - set(example.roles):
            raise RunError(
                f"{objective} needs the roles {', '.join(objective.roles)}, but prompt "
                f"{example.prompt_id} has no {', '.join(sorted(absent))}. To pick the pairs again: "
                f"{redo(examples.folder, 'rank')}"
            )
        if stored and example.reference_logps is None:
            raise RunError(
                f"{objective} needs the reference's log-probabilities, but prompt "
                f"{example.prompt_id} has none. To score this iteration again: "
                f"{redo(examples.folder, 'score')}"
            )
        if stored and objective.uses_shared and example.shared_logps is None:
            raise RunError(
                f"{objective} needs the reference's log-probabilities of shared lengths, but "
                f"prompt {example.prompt_id} has none. To score this iteration again: "
                f"{redo(examples.folder, 'score')}"
            )
        if objective.uses_scores and example.scores is None:
            raise RunError(
                f"{objective} needs the ranker's scores of the answers, but prompt "
                f"{example.prompt_id} lacks some. Name a ranker that scores all candidates, or "
                f"score the iteration again: {redo(examples.folder, 'score')}"
            )
    if objective.bonus_bits and any(example.bonus is None for example in found):
        found = with_bonuses(found, objective.bonus_bits)
    return loop.TrainingPlan.make(
        step.settings.training, found, step.settings.seed, step.t,
        rows=step.programs.batches.rows, ways=step.programs.devices.row_ways,
    )  # fmt: skip
