"""The commands `selm plan` and `selm bench`: what an experiment needs, how fast a machine is."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from selm_jax.cli.arguments import Experiment, Json, Overrides
from selm_jax.cli.root import app, set_up_jax
from selm_jax.evaluation.options import Dtype, file_to_read
from selm_jax.shell.verbs import verb


@dataclass(frozen=True, kw_only=True)
class Planning:
    """Options of `selm plan`."""

    experiment: Experiment
    overrides: Overrides = None
    topology: Annotated[
        list[str] | None,
        typer.Option(
            help="TPU slice such as v5e:4x8. May be given several times.",
            show_default="the devices of this machine",
        ),
    ] = None
    config: Annotated[
        Path | None,
        file_to_read(
            "The model's config.json, if the model is not on this machine.", "the model's own"
        ),
    ] = None
    data_rows: Annotated[
        int | None,
        typer.Option(help="Number of training rows.", min=1, show_default="counted in data.train"),
    ] = None
    heldout_rows: Annotated[
        int | None,
        typer.Option(
            help="Number of held-out rows.", min=1, show_default="counted in data.heldout"
        ),
    ] = None
    prompt_tokens: Annotated[
        int | None,
        typer.Option(
            help="Mean tokens per prompt.", min=1, show_default="measured, or half the limit"
        ),
    ] = None
    response_tokens: Annotated[
        int | None,
        typer.Option(help="Mean tokens per answer.", min=1, show_default="rollout.max_new_tokens"),
    ] = None
    mfu: Annotated[
        float,
        typer.Option(
            help="Share of the peak FLOP/s that training is assumed to reach.", min=0.01, max=1
        ),
    ] = 0.4
    mbu: Annotated[
        float,
        typer.Option(
            help="Share of the memory bandwidth that decoding is assumed to reach.", min=0.01, max=1
        ),
    ] = 0.6
    price: Annotated[
        float | None,
        typer.Option(help="Dollars per chip-hour.", min=0, show_default="no cost is shown"),
    ] = None
    hbm: Annotated[
        float | None,
        typer.Option(help="Memory per device in GiB.", show_default="the built-in value"),
    ] = None
    tries: Annotated[
        int,
        typer.Option(
            help="How many changes to the settings to try if the experiment does not fit.", min=0
        ),
    ] = 8
    json: Json = None


@verb(
    app,
    needs="the model's config.json; for a TPU slice also libtpu (`pip install 'selm_jax[tpu]'`)",
    writes="to the terminal, and the file of --json; exit status 3 means that it does not fit",
    example="selm plan experiments/paper/zephyr_7b/selm.yaml --topology v5e:4x8",
)
def plan(options: Planning) -> None:
    """Estimate memory, time and cost on a machine.

    The programs are compiled for that machine, which need not be this one. No weights are read.
    """
    from selm_jax.commands import runs
    from selm_jax.plan import command
    from selm_jax.plan.examine import Options

    o = options
    given = list(o.overrides or [])
    known = {f.name for f in dataclasses.fields(Options)}
    status = command.main(
        lambda change: runs.settings_of(o.experiment, [*given, *change]),
        o.topology or [], config=o.config, out=o.json,
        options=Options(**{k: v for k, v in vars(o).items() if k in known}),
    )  # fmt: skip
    raise typer.Exit(status)


def _size(help: str) -> typer.models.OptionInfo:
    return typer.Option(help=help, show_default="what suits the device")


@dataclass(frozen=True, kw_only=True)
class Benching:
    """Options of `selm bench`."""

    model: Annotated[
        str, typer.Argument(help="Model folder, Hub id or GGUF file.", metavar="[MODEL]")
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct"
    shape: Annotated[
        str | None,
        typer.Option(
            help="Measure a randomly initialised model instead: 135m, 1b, or 8b-layers (four "
            "layers of an 8B model).",
            show_default="MODEL",
        ),
    ] = None
    dtype: Dtype = "auto"
    remat: Annotated[
        str, typer.Option(help="What the backward pass recomputes: none, mlp, dots or full.")
    ] = "full"
    peak: Annotated[
        float | None,
        typer.Option(help="Peak TFLOP/s of one device.", show_default="the built-in value"),
    ] = None
    bandwidth: Annotated[
        float | None,
        typer.Option(
            help="Memory bandwidth of one device in GB/s.", show_default="the built-in value"
        ),
    ] = None
    steps: Annotated[int | None, _size("Number of repetitions.")] = None
    examples: Annotated[
        int | None,
        typer.Option(help="Examples per update.", show_default="as many as fit in a batch"),
    ] = None
    prompt: Annotated[int | None, _size("Tokens per prompt.")] = None
    response: Annotated[int | None, _size("Tokens per response.")] = None
    rows: Annotated[int | None, _size("Packed rows per batch.")] = None
    row_length: Annotated[
        list[int] | None, _size("Tokens per row; give it repeatedly to measure several.")
    ] = None
    slots: Annotated[int | None, _size("Responses that are decoded together.")] = None
    capacity: Annotated[
        list[int] | None,
        _size("Tokens of a prompt and its answer that there is room for; may be repeated."),
    ] = None
    json: Json = None


@verb(
    app,
    needs="a model, or --shape, which needs none",
    writes="a table to the terminal, and the file of --json",
    example="selm bench --shape 135m",
)
def bench(options: Benching) -> None:
    """Measure how fast this machine is.

    A model is trained and generates answers; the memory that this takes is measured too.
    """
    set_up_jax()
    from selm_jax import bench

    bench.main(**dataclasses.asdict(options))
