"""`selm lab ...`: the laboratory's experiments from the command line.

Each verb prints its findings, and writes every number to NAME.json and the figure to NAME.svg.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from selm_jax.shell import artifacts
from selm_jax.shell.paths import folder_to_write

app = typer.Typer(
    help="Small exact worlds: does an exploration term explore? See docs/exploration.md.",
    no_args_is_help=True,
)

Seeds = Annotated[int, typer.Option(help="Worlds, each with its own noise, per setting.", min=2)]
Seed = Annotated[int, typer.Option(help="The number from which all the seeds follow.")]
Out = Annotated[
    Path,
    typer.Option("--out", "-o", help="Folder for the numbers and figures.", parser=folder_to_write),
]
FOLDER = Path("runs/lab")


@app.command()
def regret(seeds: Seeds = 128, seed: Seed = 0, out: Out = FOLDER) -> None:
    """Cumulative regret of every algorithm in every landscape, and its slope."""
    from selm_jax.lab import experiments, plots

    records = _write(experiments.regret_curves(seeds, seed), out / "lab_regret.json")
    typer.echo(
        f"{'algorithm':<15}{'landscape':<11}{'regret, 95 %':>22}{'slope, 95 %':>20}"
        "   difference, Holm's p"
    )
    for r in records:
        total = f"{r['mean'][-1]:.2f} {_ends(r['low'][-1], r['high'][-1], '.2f')}"
        slope = f"{r['slope']:.2f} {_ends(r['slope_low'], r['slope_high'], '.2f')}"
        typer.echo(
            f"{r['algorithm']:<15}{r['landscape']:<11}{total:>22}{slope:>20}"
            + (f"{_difference(r['against'])} {r['against']['of']}" if "against" in r else "")
        )
    made = _made_by("regret", seeds, seed, "regret_curves")
    plots.regret(records, out / "lab_regret.svg", made)


@app.command(name="map")
def map_(
    landscape: Annotated[
        str, typer.Option(help="two_peaks, needle, smooth or random.")
    ] = "two_peaks",
    dimensions: Annotated[
        str | None, typer.Option(help="Of the features, such as 4,16,tabular; all by default.")
    ] = None,
    seeds: Seeds = 128,
    seed: Seed = 0,
    out: Out = FOLDER,
) -> None:
    """Where SELM's term lowers regret and where not: alpha, noise, coverage, dimension."""
    from selm_jax.lab import experiments, plots, stats, worlds

    if landscape not in worlds.LANDSCAPES:
        raise typer.BadParameter(f"landscape {landscape!r}; expected one of {worlds.LANDSCAPES}")
    asked = experiments.MAP_DIMENSIONS if dimensions is None else _dimensions(dimensions)
    parts = experiments.optimism_map(seeds, seed, landscape=landscape, dimensions=asked)
    found = _collect(parts, "dimension")
    verb = f"map --landscape {landscape}" + (f" --dimensions {dimensions}" if dimensions else "")
    everything = []
    for against in ("online", "passive"):
        records = _rounded(stats.correct([r for r in found if r["against"] == against]))
        sure = [r for r in records if r["p_holm"] < 0.05]
        for which, chosen in (("> 0", [r for r in records if r["alpha"] > 0]),
                              ("< 0", [r for r in records if r["alpha"] < 0])):  # fmt: skip
            less = sum(r in sure and r["difference"] < 0 for r in chosen)
            more = sum(r in sure and r["difference"] > 0 for r in chosen)
            typer.echo(
                f"against {against} DPO, alpha {which}: of {len(chosen)} settings {less} have less "
                f"regret, {more} more, {len(chosen) - less - more} undecided (Holm, 5 %)"
            )
        made = _made_by(verb, seeds, seed, "optimism_map") + f"; against {against} DPO"
        plots.heat_maps(records, out / f"lab_map_{landscape}_{against}.svg", made)
        everything += records
    _write(everything, out / f"lab_map_{landscape}.json")


@app.command()
def conditions(seeds: Seeds = 128, seed: Seed = 0, out: Out = FOLDER) -> None:
    """One condition at a time: landscape, data, noise, reference, sampler, solver."""
    from selm_jax.lab import experiments, plots, stats

    found = stats.correct(_collect(experiments.one_at_a_time(seeds, seed), "condition"))
    records = _write(found, out / "lab_conditions.json")
    _print(records, ("condition", "alpha"))
    made = _made_by("conditions", seeds, seed, "one_at_a_time")
    plots.table(records, "alpha", "condition", out / "lab_conditions.svg", made)


@app.command()
def why(seeds: Seeds = 128, seed: Seed = 0, out: Out = FOLDER) -> None:
    """Better data or another fit? The term in the asking policy alone, in the judged one alone."""
    from selm_jax.lab import experiments, plots, stats

    found = stats.correct(_collect(experiments.why(seeds, seed), "condition"))
    records = _write(found, out / "lab_why.json")
    _print(records, ("condition", "variant", "setting"))
    for r in records:
        r["variant and setting"] = f"{r['variant']}\n{r['setting']:g}"
    made = _made_by("why", seeds, seed, "why")
    plots.table(records, "variant and setting", "condition", out / "lab_why.svg", made)


@app.command()
def idea(
    loss: Annotated[str, typer.Argument(help="As in a YAML: name, sum, package.module:function.")],
    settings: Annotated[
        list[str] | None, typer.Argument(help="key=value of the loss; key=a,b,c tries each.")
    ] = None,
    beta: Annotated[float, typer.Option(help="KL strength, of the loss and of the world.")] = 0.1,
    seeds: Seeds = 128,
    seed: Seed = 0,
    out: Out = FOLDER,
) -> None:
    """Your loss against SELM and DPO: the same worlds, queries and seeds, in every landscape."""
    from selm_jax.lab import experiments, plots, stats
    from selm_jax.objectives.build import build_objective

    choices = [_choices(setting) for setting in settings or []]
    tried = {f"selm alpha={a}": build_objective("selm", beta=beta, alpha=a) for a in (0.01, 0.1)}
    for values in itertools.product(*choices):
        name = " ".join((loss.rpartition(":")[2], *(f"{k}={v:g}" for k, v in values)))
        tried[name] = build_objective(loss, beta=beta, **dict(values))
    found = _collect(experiments.idea(tried, seeds, seed, beta=beta), "objective")
    compared = stats.correct([r for r in found if r["objective"] != "dpo"])
    records = _write(compared, out / "lab_idea.json")
    _print(records, ("objective", "landscape"))
    verb = " ".join(["idea", loss, *(settings or []), f"--beta {beta:g}"])
    made = _made_by(verb, seeds, seed, "idea")
    plots.table(records, "landscape", "objective", out / "lab_idea.svg", made)


@app.command()
def theory(seeds: Seeds = 128, seed: Seed = 0, out: Out = FOLDER) -> None:
    """What the SELM paper's Theorem 5.3 prescribes in these worlds, and what comes of it."""
    from selm_jax.lab import experiments, stats

    found = _collect(experiments.theorem(seeds, seed), "beta")
    records = _write(stats.correct(found), out / "lab_theory.json")
    typer.echo(
        f"{'beta':>5}{'T':>5}{'R_max':>7}{'alpha':>10}{'bound':>10}{'worst':>8}"
        "   regret at this alpha to DPO's, Holm's p"
    )
    for r in records:
        typer.echo(
            f"{r['beta']:>5g}{r['rounds']:>5}{r['r_max']:>7.2f}{r['alpha']:>10.2g}"
            f"{r['bound']:>10.2g}{r['worst']:>8.0f}{_difference(r)}"
        )


@app.command()
def decoder(
    alphas: Annotated[str, typer.Option(help="Separated by commas.")] = "0.01,0.1,1",
    rounds: Annotated[int, typer.Option(help="Of 8 queries and 4 updates each.", min=1)] = 12,
    rate: Annotated[float, typer.Option(help="Adam's learning rate.")] = 1e-3,
    seeds: Seeds = 8,
    seed: Seed = 0,
    out: Out = FOLDER,
) -> None:
    """A real (tiny) decoder, trained by the packed update: its exact regret to that of DPO."""
    from selm_jax.lab import decoder_world

    found = decoder_world.regret(_numbers(alphas), seeds, seed, rounds=rounds, rate=rate)
    records = _write(found, out / "lab_decoder.json")
    typer.echo(
        f"DPO: cumulative regret {records[0]['base']:.3f}; untrained: {records[0]['still']:.3f}"
    )
    for r in records:
        typer.echo(f"alpha {r['alpha']:<6g}{_difference(r)}")


def _collect(parts: Iterable[list[dict[str, Any]]], name: str) -> list[dict[str, Any]]:
    """All the records; says after each part how long it took, for the waiting."""
    records, start = [], time.monotonic()
    for part in parts:
        records += part
        typer.echo(f"{name} {part[0][name]}: {time.monotonic() - start:.0f} s", err=True)
    return records


def _print(records: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    typer.echo(f"{', '.join(names)}: difference of cumulative regret [95 %], in %, Holm's p")
    for r in records:
        typer.echo(f"{', '.join(f'{r[n]}' for n in names):<40}{_difference(r)}")


def _difference(r: dict[str, Any]) -> str:
    return (
        f" {r['difference']:+.3f} {_ends(r['low'], r['high'], '+.3f')}"
        f"{100 * r['relative']:>+8.1f} %  {r['p_holm']:.2g}"
    )


def _ends(low: float | None, high: float | None, form: str) -> str:
    """An interval; there is none of a single seed, or where all seeds have one value."""
    return "(no interval)" if low is None else f"[{low:{form}}, {high:{form}}]"


def _rounded(value: Any) -> Any:
    """Six digits of every float. What is printed and drawn is what is written."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def _write(records: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """One record a line, rounded; returns what it wrote."""
    records = _rounded(records)
    lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in records)
    artifacts.write_text(file, f"[\n{lines}\n]\n")
    typer.echo(f"numbers: {file}")
    return records


def _made_by(verb: str, seeds: int, seed: int, function: str) -> str:
    return (
        f"selm lab {verb} --seeds {seeds} --seed {seed}; {seeds} seeds per setting; "
        f"selm_jax/lab/experiments.py, {function}"
    )


def _numbers(text: str) -> list[float]:
    try:
        return [float(x) for x in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}; expected numbers separated by commas") from error


def _dimensions(text: str) -> list[int | None]:
    try:
        return [None if x == "tabular" else int(x) for x in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r}; expected such as 4,16,tabular") from error


def _choices(setting: str) -> list[tuple[str, float]]:
    key, equals, values = setting.partition("=")
    if not equals or not key.isidentifier():
        raise typer.BadParameter(f"{setting!r}; expected key=value or key=a,b,c")
    return [(key, value) for value in _numbers(values)]
