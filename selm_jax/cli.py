"""The command line: `selm VERB ...`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from selm_jax.commands.ending import carried_out
from selm_jax.evaluation.benchmarks.command import app as evaluation
from selm_jax.lab.command import app as lab
from selm_jax.shell.paths import file_to_write, folder_to_write, place

app = typer.Typer(
    help="Self-Exploring Language Models in JAX: align a language model by exploring.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

ConfigFile = Annotated[
    Path, typer.Argument(help="Experiment file (YAML).", metavar="EXPERIMENT", parser=place)
]
Overrides = Annotated[
    list[str] | None, typer.Argument(help="Settings to change: key.path=value ...")
]
Json = Annotated[Path | None, typer.Option(help="Write the result here too.", parser=file_to_write)]
Iteration = Annotated[int, typer.Option("--iteration", "-t", help="1, 2, ...")]


@app.command()
def run(
    experiment: ConfigFile,
    overrides: Overrides = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Rehearse it: a tiny random model, 64 made-up rows.")
    ] = False,
) -> None:
    """Run an experiment, or what is left of it, and write its report."""
    from selm_jax.commands import runs
    from selm_jax.iterate import iterate

    iterate(runs.opened(experiment, overrides, tiny=tiny, processes=True))


def _stage_verb(stage: str, help: str, name: str | None = None, old: str | None = None) -> None:
    """A verb that runs one stage.

    Args:
      name: of the verb; default: the stage's.
      old: the verb's former name, which still works.
    """

    def verb(experiment: ConfigFile, iteration: Iteration, overrides: Overrides = None) -> None:
        from selm_jax.commands import runs
        from selm_jax.iterate import run_stage

        run_stage(runs.opened(experiment, overrides, processes=True), stage, iteration)

    def old_verb(experiment: ConfigFile, iteration: Iteration, overrides: Overrides = None) -> None:
        typer.echo(f"`selm {old}` is called `selm {name}` now; use that name", err=True)
        verb(experiment, iteration, overrides)

    app.command(name or stage, help=help)(verb)
    if old is not None:
        app.command(old, help=help, hidden=True)(old_verb)


_stage_verb("generate", "One stage alone: the policy answers the iteration's prompts.")
_stage_verb("rank", "One stage alone: candidates are scored and paired.")
_stage_verb("score", "One stage alone: log-probabilities under the reference.")
_stage_verb("train", "One stage alone: the updates.")
_stage_verb(
    "evaluate", "One stage alone: held-out answers and their reward.", "measure", old="evaluate"
)


@app.command()
def export(
    experiment: ConfigFile,
    iteration: Iteration,
    overrides: Overrides = None,
    to: Annotated[
        Path | None,
        typer.Option(
            help="Write the policy here as well, to be handed on.", parser=folder_to_write
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights in --to: float32, bfloat16 or float16.")
    ] = "bfloat16",
) -> None:
    """One stage alone: the policy as a Hugging Face folder; and, if asked, a copy to publish."""
    from selm_jax.commands import runs
    from selm_jax.iterate import run_stage
    from selm_jax.parallel import multihost
    from selm_jax.shell import artifacts
    from selm_jax.weights.export import convert_dtype

    run = runs.opened(experiment, overrides, processes=True)

    def check(to: Path) -> None:
        if to.exists():
            raise artifacts.ArtifactError(f"{to}: is there already; --to makes a new folder")

    if to is not None:
        multihost.on_first(lambda: check(to))
    run_stage(run, "export", iteration)

    def publish(to: Path) -> None:
        with artifacts.whole(to) as partial:
            convert_dtype(run.policy(iteration).path, partial, dtype)
        typer.echo(f"{to}: the policy after iteration {iteration}, in {dtype}")

    if to is not None:
        multihost.on_first(lambda: publish(to))


@app.command()
def preview(
    experiment: ConfigFile,
    overrides: Overrides = None,
    rows: Annotated[int, typer.Option("--rows", "-n", min=0, help="Rows to show.")] = 8,
    iteration: Iteration = 1,
) -> None:
    """Show what is trained on: rows coloured by role, counts and lengths. Computes nothing."""
    from selm_jax.commands import preview, runs

    preview.preview(runs.opened(experiment, overrides, imports=False), iteration, rows)


@app.command()
def plan(
    experiment: ConfigFile,
    overrides: Overrides = None,
    topology: Annotated[
        list[str] | None,
        typer.Option(help="A slice such as v5e:4x8; may be repeated. Default: the devices here."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            help="The model's config.json, where the model is not here.",
            metavar="FILE",
            parser=place,
        ),
    ] = None,
    data_rows: Annotated[int | None, typer.Option(help="Rows of data.train.", min=1)] = None,
    heldout_rows: Annotated[int | None, typer.Option(help="Rows of data.heldout.", min=1)] = None,
    prompt_tokens: Annotated[int | None, typer.Option(help="Of a prompt, mean.", min=1)] = None,
    response_tokens: Annotated[int | None, typer.Option(help="Of an answer, mean.", min=1)] = None,
    mfu: Annotated[
        float, typer.Option(help="Share of the peak arithmetic that is reached.", min=0.01, max=1)
    ] = 0.4,
    mbu: Annotated[
        float, typer.Option(help="Share of the memory's bandwidth, in decoding.", min=0.01, max=1)
    ] = 0.6,
    price: Annotated[float | None, typer.Option(help="Dollars of a chip's hour.", min=0)] = None,
    hbm: Annotated[float | None, typer.Option(help="GiB of a device, if not the known.")] = None,
    tries: Annotated[
        int, typer.Option(help="Changes to compile in search of one that fits.", min=0)
    ] = 8,
    json: Json = None,
) -> None:
    """Compile it for a TPU slice that is not here: does it fit, how long, what does it cost?

    Exit status 3 where it does not fit. Nothing is trained, no weights are read.
    """
    from selm_jax import config as experiments
    from selm_jax.plan import command
    from selm_jax.plan.examine import Options

    given = list(overrides or [])
    options = Options(
        data_rows, heldout_rows, prompt_tokens, response_tokens, mfu, mbu, hbm, price,
        tries,
    )  # fmt: skip
    status = command.main(
        lambda change: experiments.load(experiment, [*given, *change]),
        topology or [], config=config, out=json, options=options,
    )  # fmt: skip
    raise typer.Exit(status)


@app.command()
def annotate(
    folder: Annotated[Path, typer.Argument(help="Run folder.", metavar="RUN", parser=place)],
    iteration: Annotated[
        int | None, typer.Option("--iteration", "-t", help="1, 2, ...; the last one by default.")
    ] = None,
    minimum: Annotated[int | None, typer.Option(help="People who rank each prompt.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8642,
    export: Annotated[
        Path | None, typer.Option(help="Write .jsonl or .parquet instead.", parser=file_to_write)
    ] = None,
    layout: Annotated[str, typer.Option(help="Of --export: trl or ultrafeedback.")] = "trl",
    read: Annotated[
        Path | None,
        typer.Option(
            "--import", help="Read rankings from such a file instead.", metavar="FILE", parser=place
        ),
    ] = None,
) -> None:
    """Let people rank the answers of an iteration, on a page of this machine."""
    from selm_jax.annotate import exchange, server
    from selm_jax.commands import runs
    from selm_jax.stages.questions import put_questions

    run = runs.finished(folder)
    t = iteration or runs.last_generated(folder)
    store, batch = put_questions(run, t, minimum)
    if read is not None:
        typer.echo(f"{read}: {_told(exchange.import_pairs(store, batch, read))}")
    elif export is not None:
        typer.echo(f"{export}: {_told(exchange.export_pairs(store, batch, export, layout))}")
    else:
        typer.echo(f"{store.path}: {len(store.items(batch))} questions. Ctrl-C ends.")
        server.serve(store, batch, batch, host, port, typer.echo)


def _told(counts: Mapping[str, int | float]) -> str:
    return ", ".join(f"{v:,.3f} {k}" if v % 1 else f"{v:,.0f} {k}" for k, v in counts.items())


@app.command()
def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Run folders; several are compared.", parser=place),
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="The page to write.", parser=file_to_write),
    ] = None,
) -> None:
    """Write the page of one run, or of several beside each other."""
    from selm_jax.report import page

    out = out or (runs[0] / "report.html" if len(runs) == 1 else Path("report.html"))
    page.write(runs, out)
    typer.echo(f"report: {out}")


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(help="Sweep file (YAML).", metavar="FILE", parser=place)],
    overrides: Overrides = None,
    base: Annotated[
        str | None, typer.Option(help="Another base experiment than the file names.")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Another folder than the file names.")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="Other seeds than the file names, such as 1,2,3.")
    ] = None,
    tiny: Annotated[
        bool, typer.Option("--tiny", help="Rehearse it: tiny random models, made-up rows.")
    ] = False,
) -> None:
    """Run an experiment in many settings and seeds, or what is left of it, and compare them."""
    _set_up_jax()
    from selm_jax.parallel import multihost

    multihost.initialize()
    from selm_jax.sweep import sweep
    from selm_jax.sweep.grid import read_sweep

    try:
        numbers = [int(each) for each in seeds.split(",")] if seeds else None
    except ValueError:
        raise typer.BadParameter(f"--seeds {seeds}: expected numbers, such as 1,2,3") from None
    sweep(read_sweep(file, overrides or [], base=base, output=output, seeds=numbers, tiny=tiny))


@app.command()
def figures(
    runs: Annotated[
        list[Path] | None,
        typer.Argument(help="Run folders.", parser=place),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder.", parser=folder_to_write)
    ] = Path("figures"),
    pairs: Annotated[
        str | None, typer.Option(help="Preference pairs of figure 4 (prompt, chosen, rejected).")
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Draw the paper's own numbers too, marked as such.")
    ] = False,
) -> None:
    """Draw the paper's figures 2 to 6 of any runs, with their data beside them."""
    from selm_jax.commands import figures
    from selm_jax.commands.runs import finished

    _set_up_jax()
    figures.write([finished(run) for run in runs or []], out, pairs=pairs, published=published)


@app.command()
def bench(
    model: Annotated[
        str, typer.Argument(help="Model folder, Hub id or GGUF file.")
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct",
    shape: Annotated[
        str | None, typer.Option(help="A random model of this shape instead, such as 1b.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32 or bfloat16.")] = "auto",
    remat: Annotated[str, typer.Option(help="none, mlp, dots or full.")] = "full",
    peak: Annotated[float | None, typer.Option(help="TFLOP/s of one device, if known.")] = None,
    steps: Annotated[int | None, typer.Option(help="Repetitions.")] = None,
    examples: Annotated[int | None, typer.Option(help="Examples per update.")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of a prompt.")] = None,
    response: Annotated[int | None, typer.Option(help="Tokens of a response.")] = None,
    rows: Annotated[int | None, typer.Option(help="Packed rows of a batch.")] = None,
    row_length: Annotated[int | None, typer.Option(help="Tokens of a row.")] = None,
    slots: Annotated[int | None, typer.Option(help="Responses decoded together.")] = None,
    json: Json = None,
) -> None:
    """Measure how fast this machine trains and generates, and how much memory that takes."""
    _set_up_jax()
    from selm_jax import bench

    sizes = {
        "steps": steps, "examples": examples, "prompt": prompt, "response": response,
        "rows": rows, "row_length": row_length, "slots": slots,
    }  # fmt: skip
    bench.main(model, shape=shape, dtype=dtype, remat=remat, peak=peak, json=json, **sizes)


def _set_up_jax() -> None:
    from selm_jax.commands.runs import set_up_jax

    set_up_jax()


app.add_typer(lab, name="lab", callback=_set_up_jax)
app.add_typer(evaluation, name="eval", callback=_set_up_jax)


def main() -> None:
    """Entry point."""
    carried_out(lambda: app(standalone_mode=False))
