"""Commands that run an experiment: all stages, one stage, a stage again, or a sweep."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from selm_jax.cli.arguments import Experiment, Iteration, Overrides, Run, Tiny
from selm_jax.cli.root import app, set_up_jax
from selm_jax.shell.paths import folder_to_write, place
from selm_jax.shell.verbs import verb


@dataclass(frozen=True, kw_only=True)
class Running:
    """Options of `selm run`."""

    experiment: Experiment
    overrides: Overrides = None
    tiny: Tiny = False


@verb(
    app,
    needs="the model and the data that the experiment names",
    writes="the run folder that `output` names, with models, metrics and report.html",
    example="selm run experiments/quickstart.yaml training.learning_rate=1e-5",
)
def run(options: Running) -> None:
    """Run or continue an experiment.

    Stop it with Ctrl-C; the same command continues. --tiny rehearses the experiment in a minute.
    """
    from selm_jax.commands import runs
    from selm_jax.iterate import iterate

    iterate(runs.opened(options.experiment, options.overrides, tiny=options.tiny, processes=True))


@dataclass(frozen=True, kw_only=True)
class OneStage:
    """Options of a command that runs a single stage."""

    experiment: Experiment
    iteration: Iteration
    overrides: Overrides = None


def _stage_verb(
    stage: str, about: str, needs: str, writes: str, name: str | None = None, old: bool = False
) -> None:
    """Adds a command that runs one stage. If `old`, it tells the user to use its new name."""
    name = name or stage

    def work(options: OneStage) -> None:
        from selm_jax.commands import runs
        from selm_jax.iterate import run_stage

        if old:
            typer.echo("`selm evaluate` is now called `selm measure`; use that name", err=True)
        run = runs.opened(options.experiment, options.overrides, processes=True)
        run_stage(run, stage, options.iteration)

    work.__doc__ = about
    example = f"selm {name} experiments/quickstart.yaml -t 1"
    verb(app, name, needs=needs, writes=writes, example=example, hidden=old)(work)


_stage_verb(
    "generate", "Stage: the policy answers the prompts.",
    "the policy of the iteration before, or the start model",
    "iteration_T/responses/ in the run folder",
)  # fmt: skip
_stage_verb(
    "rank", "Stage: score the answers and pick pairs.",
    "the answers of `selm generate`, and whatever the ranker needs",
    "iteration_T/ranked.parquet in the run folder",
)  # fmt: skip
_stage_verb(
    "score", "Stage: compute reference log-probs.",
    "the pairs of `selm rank`", "iteration_T/examples.parquet in the run folder",
)  # fmt: skip
_stage_verb(
    "train", "Stage: train the policy.", "the examples of `selm score`",
    "iteration_T/checkpoints/ and metrics.jsonl in the run folder",
)  # fmt: skip
_MEASURE = (
    "evaluate", "Stage: measure held-out answers.",
    "the model of `selm export`; iteration 0 is the start model",
    "iteration_T/heldout.parquet in the run folder",
)  # fmt: skip
_stage_verb(*_MEASURE, name="measure")
_stage_verb(*_MEASURE, name="evaluate", old=True)


@dataclass(frozen=True, kw_only=True)
class Exporting(OneStage):
    """Options of `selm export`."""

    to: Annotated[
        Path | None,
        typer.Option(
            help="Also write a copy of the model to this new folder, to publish it.",
            metavar="FOLDER",
            parser=folder_to_write,
            show_default="no copy",
        ),
    ] = None
    dtype: Annotated[
        str, typer.Option(help="Number format of the copy: float32, bfloat16 or float16.")
    ] = "bfloat16"


@verb(
    app,
    needs="the checkpoints of `selm train`",
    writes="iteration_T/model/ in the run folder, and the folder of --to if it is given",
    example="selm export experiments/quickstart.yaml -t 3 --to my-model",
)
def export(options: Exporting) -> None:
    """Stage: write the model for Hugging Face.

    The folder can be read by transformers, vLLM and lm-eval.
    """
    from selm_jax.commands import runs
    from selm_jax.iterate import run_stage
    from selm_jax.parallel import multihost
    from selm_jax.shell import artifacts
    from selm_jax.shell.mirror import need
    from selm_jax.weights.export import convert_dtype

    run, to = runs.opened(options.experiment, options.overrides, processes=True), options.to

    def check(to: Path) -> None:
        if to.exists():
            raise artifacts.ArtifactError(f"{to} already exists; give --to a new folder's name")

    if to is not None:
        multihost.on_first(lambda: check(to))
    run_stage(run, "export", options.iteration)

    def publish(to: Path) -> None:
        with artifacts.whole(to) as partial:
            convert_dtype(need(run.policy(options.iteration).path), partial, options.dtype)
        typer.echo(f"{to}: the policy after iteration {options.iteration}, in {options.dtype}")

    if to is not None:
        multihost.on_first(lambda: publish(to))


@dataclass(frozen=True, kw_only=True)
class Redoing:
    """Options of `selm redo`."""

    run: Run
    stage: Annotated[
        str,
        typer.Argument(
            help="Stage to run again: generate, rank, score, train, export or evaluate.",
            metavar="STAGE",
        ),
    ]
    iteration: Iteration


@verb(
    app,
    needs="a run folder in which no process is working",
    writes="stage.json and metrics.jsonl in the run folder; the stages' results are deleted",
    example="selm redo runs/quickstart rank -t 2",
)
def redo(options: Redoing) -> None:
    """Delete a stage's results.

    The results of all stages that depend on it are deleted too, and the next run does all of them
    again. Settings and data may be changed before that. Files of other programs stay.
    """
    from selm_jax.commands.redo import redo
    from selm_jax.shell.mirror import in_words

    for line in redo(options.run, options.stage, options.iteration):
        typer.echo(in_words(line))
    typer.echo(in_words(f"`selm run {options.run}` runs these stages again"))


@dataclass(frozen=True, kw_only=True)
class Sweeping:
    """Options of `selm sweep`."""

    file: Annotated[Path, typer.Argument(help="Sweep file (YAML).", metavar="FILE", parser=place)]
    overrides: Overrides = None
    base: Annotated[
        str | None,
        typer.Option(
            help="Base experiment file, in place of the sweep file's `base`.",
            show_default="the file's",
        ),
    ] = None
    output: Annotated[
        str | None,
        typer.Option(
            "--output", "-o", help="Folder for the runs, in place of the sweep file's `output`.",
            show_default="the file's",
        ),
    ] = None  # fmt: skip
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Seeds such as 1,2,3, in place of the sweep file's `seeds`.",
            show_default="the file's",
        ),
    ] = None
    tiny: Tiny = False


@verb(
    app,
    needs="what the base experiment and every cell of the grid need; all cells are checked first",
    writes="a run folder per cell and seed, table.csv and report.html, all below `output`",
    example="selm sweep experiments/study/sweep.yaml --seeds 1,2,3",
)
def sweep(options: Sweeping) -> None:
    """Run many settings and seeds, and compare.

    The same command continues a sweep that was stopped. docs/run.md explains sweep files.
    """
    set_up_jax()
    from selm_jax.parallel import multihost

    multihost.initialize()
    from selm_jax.sweep import sweep
    from selm_jax.sweep.grid import read_sweep

    o = dataclasses.asdict(options)
    file, seeds = o.pop("file"), o.pop("seeds")
    try:
        numbers = [int(each) for each in seeds.split(",")] if seeds else None
    except ValueError:
        raise typer.BadParameter(f"--seeds {seeds}: expected numbers such as 1,2,3") from None
    sweep(read_sweep(file, o.pop("overrides") or (), seeds=numbers, **o))
