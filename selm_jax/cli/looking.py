"""Commands that show experiments and runs, and `selm annotate` for people's rankings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from selm_jax.cli.arguments import Experiment, Iteration, Overrides, Run, Tiny
from selm_jax.cli.root import app, set_up_jax
from selm_jax.evaluation.options import file_to_read
from selm_jax.shell.mirror import entered, look, named
from selm_jax.shell.paths import file_to_write, folder_to_write
from selm_jax.shell.verbs import verb


@dataclass(frozen=True, kw_only=True)
class Previewing:
    """Options of `selm preview`."""

    experiment: Experiment
    overrides: Overrides = None
    rows: Annotated[int, typer.Option("--rows", "-n", min=0, help="Number of rows to show.")] = 8
    iteration: Iteration = 1
    tiny: Tiny = False


@verb(
    app,
    needs="the model's folder (no weights are read), the data, and what the ranker needs",
    writes="to the terminal only; exit status 1 means that `selm run` would stop",
    example="selm preview experiments/quickstart.yaml -n 4",
)
def preview(options: Previewing) -> None:
    """Show the rows that a run will train on.

    It also says what would stop the run. Rows are coloured by role (prompt, scored, padding), with
    counts and lengths over all rows. The loss and the ranker are built, and every row is checked.
    Nothing is generated or trained.
    """
    from selm_jax.commands import preview, runs

    o = options
    fine = preview.preview(
        runs.looked_at(o.experiment, o.overrides, tiny=o.tiny), o.iteration, o.rows
    )
    if not fine:
        raise typer.Exit(1)


@dataclass(frozen=True, kw_only=True)
class Showing:
    """Options of `selm show`."""

    run: Run


@verb(
    app,
    needs="a run folder, finished or not, even while a process runs it",
    writes="to the terminal only",
    example="selm show runs/quickstart",
)
def show(options: Showing) -> None:
    """Show the progress of a run.

    It prints the run's stages, latest metrics, disk use and remaining time.
    """
    from selm_jax.commands.show import show
    from selm_jax.shell.progress import terminal

    show(options.run, terminal())


@dataclass(frozen=True, kw_only=True)
class OfSettings:
    """Options of `selm settings`."""

    section: Annotated[
        str | None,
        typer.Argument(
            help="A group such as training or rollout, or one key such as training.rows.",
            metavar="[SECTION]",
            show_default="all settings",
        ),
    ] = None


@verb(app, needs="nothing", writes="to the terminal only", example="selm settings training")
def settings(options: OfSettings) -> None:
    """Show the settings of an experiment.

    Each is listed with its values, its default and what it does.
    """
    from selm_jax.commands.settings import lines

    for line in lines(options.section):
        typer.echo(line)


@dataclass(frozen=True, kw_only=True)
class Reporting:
    """Options of `selm report`."""

    runs: Annotated[
        list[str],
        typer.Argument(
            help="Run folders; several are compared. NAME=FOLDER gives a run a name.",
            metavar="RUN...",
        ),
    ]
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="HTML file to write.", metavar="FILE", parser=file_to_write,
            show_default="report.html, in the run folder if there is one run",
        ),
    ] = None  # fmt: skip


@verb(
    app,
    needs="run folders with at least one finished stage",
    writes="one HTML file that needs no network",
    example="selm report dpo=runs/a selm=runs/b -o compared.html",
)
def report(options: Reporting) -> None:
    """Write an HTML report of runs.

    Several runs are compared.
    """
    from selm_jax.report import page

    names, folders = zip(*map(page.named, options.runs), strict=True)
    where = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    out = options.out or where
    page.write(list(map(look, folders)), out, names)
    typer.echo(f"report: {named(out)}")


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """Options of `selm figures`."""

    runs: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Run folders.", metavar="[RUN]...", parser=entered, show_default="no runs"
        ),
    ] = None
    out: Annotated[
        Path,
        typer.Option(
            "--out", "-o", help="Folder for the figures.", metavar="FOLDER", parser=folder_to_write
        ),
    ] = Path("figures")
    pairs: Annotated[
        str | None,
        typer.Option(
            help="File of preference pairs for figure 4 (prompt, chosen, rejected).",
            show_default="held-out pairs, or else the pairs of iteration 1",
        ),
    ] = None
    published: Annotated[
        bool,
        typer.Option("--published", help="Also draw the paper's own numbers, marked as published."),
    ] = False


@verb(
    app,
    needs="finished runs with the same ranker and held-out prompts, or --published alone",
    writes="SVG, PDF, PNG and CSV files into the folder of --out",
    example="selm figures runs/dpo runs/selm -o figures",
)
def figures(options: Drawing) -> None:
    """Draw the SELM paper's figures 2 to 6.

    They show your own runs, and with --published the paper's too.
    """
    from selm_jax.commands import figures
    from selm_jax.commands.runs import finished

    set_up_jax()
    o = options
    figures.write(
        [finished(run) for run in o.runs or []], o.out, pairs=o.pairs, published=o.published
    )


@dataclass(frozen=True, kw_only=True)
class Annotating:
    """Options of `selm annotate`."""

    run: Run
    iteration: Annotated[
        int | None,
        typer.Option(
            "--iteration", "-t", help="The iteration whose answers are ranked.",
            show_default="the last one that has answers",
        ),
    ] = None  # fmt: skip
    minimum: Annotated[
        int | None,
        typer.Option(
            help="Number of people who should rank each prompt.",
            show_default="the ranker's setting, or 1",
        ),
    ] = None
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1"
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free port.")] = 8642
    export: Annotated[
        Path | None,
        typer.Option(
            help="Write the rankings to this .jsonl or .parquet file instead of serving the page.",
            metavar="FILE", parser=file_to_write, show_default="serve the page",
        ),
    ] = None  # fmt: skip
    layout: Annotated[
        str, typer.Option(help="Columns of the --export file: trl or ultrafeedback.")
    ] = "trl"
    read: Annotated[
        Path | None,
        file_to_read(
            "Read rankings from a file like that of --export, and serve no page.",
            "serve the page", "--import",
        ),
    ] = None  # fmt: skip


@verb(
    app,
    needs="a run folder whose iteration has answers (`selm generate`)",
    writes="rankings into the run folder as they are given, or the file of --export",
    example="selm annotate runs/mine -t 1 --minimum 2",
)
def annotate(options: Annotating) -> None:
    """Let people rank answers on a web page.

    This machine serves the page, for the answers of one iteration.
    """
    from selm_jax.annotate import exchange, server
    from selm_jax.commands import runs
    from selm_jax.stages.questions import put_questions

    o = options
    t = o.iteration or runs.last_generated(o.run)
    run = runs.finished(o.run)
    store, batch = put_questions(run, t, o.minimum)
    if o.read is not None:
        typer.echo(f"{o.read}: {_told(exchange.import_pairs(store, batch, o.read))}")
    elif o.export is not None:
        typer.echo(f"{o.export}: {_told(exchange.export_pairs(store, batch, o.export, o.layout))}")
    else:
        typer.echo(f"{store.path}: {len(store.items(batch))} questions. Ctrl-C ends.")
        instructions = str(run.experiment.feedback.settings.get("instructions", ""))
        server.serve(store, batch, batch, o.host, o.port, typer.echo, instructions)


def _told(counts: Mapping[str, int | float]) -> str:
    return ", ".join(f"{v:,.3f} {k}" if v % 1 else f"{v:,.0f} {k}" for k, v in counts.items())
