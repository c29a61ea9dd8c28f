"""Checks an experiment for errors before any expensive work begins."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from selm_jax.config import Experiment
from selm_jax.feedback import ranker as rankers
from selm_jax.feedback.human import store_of
from selm_jax.models.config import DecoderConfig
from selm_jax.models.quantize import check_installed
from selm_jax.objectives.losses import Objective
from selm_jax.parallel import multihost
from selm_jax.policy.sizes import LEAST
from selm_jax.preferences.selection import by_settings
from selm_jax.rollout import remote
from selm_jax.run.data import Data
from selm_jax.run.memory import check_estimate, check_memory
from selm_jax.run.remaining import entries_of
from selm_jax.run.rows import (
    RunError,
    check_batches,
    check_heldout,
    check_own_answers,
    question,
    told_of,
    told_of_overlap,
    trained_too,
)
from selm_jax.run.run import Run
from selm_jax.text.answers import check_answers


def check(run: Run) -> None:
    """Checks an experiment by building everything that can fail, before any work is done.

    Raises:
      RunError, ChatError, ExampleError, MeshError: the settings, data, model and devices do not fit
        together.
    """
    e = run.experiment
    check_objective(run)
    for line in told_of_data(run.data):
        run.console.print(line, style="yellow", soft_wrap=True)
    if e.rollout.weights != "full" or (e.lora is not None and e.lora.base != "full"):
        check_installed()
    check_rows(run)
    check_tasks(run)
    _check_mesh(run)
    _check_programs(run)
    check_router(e, run.programs.config)
    if e.training.parameter_dtype == "bfloat16" and min(e.training.learning_rate) < 1e-5:
        run.console.print(
            "training.parameter_dtype is bfloat16: at this learning rate most steps are smaller "
            "than bfloat16 can resolve, so most parameters will not change. Use float32",
            style="yellow",
        )


def check_objective(run: Run) -> None:
    """Builds the loss, the pair selection and the ranker, and reads the data for them.

    Raises:
      RunError: the loss needs something that the data does not have.
    """
    e, data = run.experiment, run.data
    objective = run.task.objective
    _ = (by_settings(e.feedback), data.all_prompts, data.evaluated)
    multihost.on_first(lambda: _check_ranker(run))
    there = ("chosen", "rejected") if e.data.rejected else ("chosen",)
    if e.taught and not set(objective.roles) <= set(there):
        raise RunError(
            f"{objective} needs the roles {', '.join(objective.roles)}, but no "
            f"answers are generated, and the data set has only {' and '.join(there)}. Train on "
            "answers with `loss: sft` or on pairs with `loss: dpo`; for y_ref, set "
            "candidates.greedy: 1"
        )
    run.task.check_settings(e)
    if e.data.bonus is not None:
        _check_bonus(e.data.bonus, objective, data, counts="bits" in e.objective)


def _check_bonus(column: str, objective: Objective, data: Data, counts: bool) -> None:
    """Raises RunError if no term reads the bonus in the data, or if it is negative.

    Args:
      counts: whether the objective sets `bits`, by which the bonus would be counted.
    """
    if not objective.bonus_bits:
        raise RunError(
            f"data.bonus: {column}; {objective} reads no bonus. Set data.bonus: null, or name the "
            "loss copo"
        )
    if counts:
        raise RunError(
            f"objective.bits: it has no effect, because the bonus is read from data.bonus: {column}"
            ". Remove objective.bits, or set data.bonus: null to count answers"
        )
    bad = next((p for p in data.every_prompt() if not p.row[column] >= 0), None)
    if bad is not None:
        raise RunError(
            f"prompt {bad.id}: the bonus in column {column!r} is {bad.row[column]:g}; expected a "
            "number of at least 0. Correct the row"
        )


def _check_ranker(run: Run) -> None:
    """Checks the ranker, which only the first process uses."""
    f = run.experiment.feedback
    if f.ranker == "human":
        store_of(run.folder.path, f.settings)
    rows = [] if run.experiment.taught else [*run.data.every_prompt(), *run.data.evaluated]
    rankers.check_asked(run.ranker.ranker, [question(prompt) for prompt in rows])


def _check_mesh(run: Run) -> None:
    rows, mesh = run.sizes.sizes.rows, run.devices.mesh
    if rows % run.devices.row_ways:
        raise RunError(
            f"training.rows is {rows}, but rows are sharded over the mesh axes data and fsdp "
            f"({mesh.shape['data']} x {mesh.shape['fsdp']}). Set training.rows to a multiple of "
            f"{run.devices.row_ways}"
        )


def _check_programs(run: Run) -> None:
    """Builds the programs without compiling them."""
    for line, style in ((run.sizes.note, "yellow"), (run.sizes.line, "")):
        if line:
            run.console.print(line, style=style, soft_wrap=True, markup=False, highlight=False)
    programs, server = run.programs, run.experiment.rollout.remote
    _ = (programs.optimizer, programs.abstract_trained)
    if _will_train(run):
        for line in [*check_memory(programs), *_of_estimates(run)]:
            run.console.print(line, style="yellow", soft_wrap=True, markup=False)
    if not run.task.answers:
        return
    _ = (programs.engine, programs.decoding_shardings)
    if server is not None:
        tokens = run.data.longest_prompt + run.experiment.rollout.max_new_tokens
        multihost.on_first(lambda: remote.check(server, tokens))


def check_tasks(run: Run) -> None:
    """Loads the tasks of the capability guard, if some iteration is still to be evaluated.

    Raises:
      EvaluationError: see `Data.loaded_tasks`.
      RunError: a reward model would have to answer questions.
    """
    tasks = run.data.tasks(None)
    if tasks is None:
        return
    if not run.task.answers:
        raise RunError(
            f"evaluation.tasks: {run.task.loss} trains a reward model, which answers no questions. "
            "Set evaluation.tasks: []"
        )
    entries = entries_of(run.folder.path)
    unfinished = (
        t for t in (0, *run.iterations) if not entries.get(t, {}).get("evaluate", {}).get("done")
    )
    if any(run.wanted.says("evaluate", t) == "do" for t in unfinished):
        tasks.load()


def _of_estimates(run: Run) -> Iterator[str]:
    """Checks that the estimates of generation and training fit on a CPU, and yields notes."""
    chosen = run.sizes
    least = dataclasses.replace(LEAST, **chosen.floors)
    if chosen.generation is not None and run.experiment.rollout.remote is None:
        yield from check_estimate("generate", chosen.generation, chosen.sizes, least)
    yield from check_estimate("train", chosen.training, chosen.sizes, least)


def check_router(e: Experiment, config: DecoderConfig) -> None:
    """Raises RunError if routers are to be trained in a model that has none."""
    if e.training.router == "trained" and config.mixture is None:
        raise RunError(
            f"training.router is trained, but {e.model.source} is no mixture of experts and has no "
            "routers. Set training.router: frozen, or model.source to a mixture of experts"
        )


def _will_train(run: Run) -> bool:
    entries = entries_of(run.folder.path)
    unfinished = (t for t in run.iterations if not entries.get(t, {}).get("train", {}).get("done"))
    return any(run.wanted.says("train", t) == "do" for t in unfinished)


def check_rows(run: Run) -> None:
    """Checks all rows that the run will use, so that none of them stops a later stage."""
    e, data, task = run.experiment, run.data, run.task
    prompts = list(data.every_prompt())
    strict = e.data.on_bad_row == "error"
    check_heldout(e.data, data.heldout, data.trained_too)
    own = task.whose_answers(prompts, data.evaluated, strict) if e.candidates.dataset else ()
    if own:
        with run.bar("checking the answers", len(own), "prompts") as advance:
            check_own_answers(data.misfit, own, advance, strict)
    if task.answers:
        _ = data.longest_prompt
    if e.candidates.dataset or e.text.layout == "paper":
        check_answers(
            data.chat, prompts, layout=e.text.layout, on_bad_row=e.data.on_bad_row,
            whole=not task.answers,
        )  # fmt: skip
    check_batches(e, [len(data.prompts(t)) for t in run.iterations])


def told_of_data(data: Data) -> Iterator[str]:
    """Yields notes for the user on rows and columns of the data that are not used as expected."""
    d = data.experiment.data
    yield from told_of(d.train, data.all_prompts)
    yield from told_of(str(d.heldout), data.heldout_rows)
    yield from told_of_overlap(d, data.heldout, data.trained_too)
    for name, of_set in data.of_sets.items():
        yield from told_of(str(of_set.heldout), data.set_rows[name])
        found = data.heldout_sets[name]
        yield from told_of_overlap(of_set, found, trained_too(found, data.every_prompt()))
