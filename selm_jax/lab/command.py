"""The commands of `selm lab`, which run experiments in small worlds.

Each verb prints its findings, and writes a page to NAME.html, which begins with the answer, all
numbers to NAME.json, and the figure to NAME.svg, NAME.pdf and NAME.png.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from selm_jax.shell import artifacts
from selm_jax.shell.paths import folder_to_write
from selm_jax.shell.verbs import Work, verb

app = typer.Typer(
    help="Test exploration in small worlds. The regret is computed exactly (docs/exploration.md).",
    no_args_is_help=True,
)

Seed = Annotated[int, typer.Option(help="Seed of all random numbers.")]
Out = Annotated[
    Path,
    typer.Option(
        "--out", "-o", help="Folder for numbers and figures.", metavar="FOLDER",
        parser=folder_to_write,
    ),
]  # fmt: skip


@dataclass(frozen=True)
class Sampled:
    """Options of `selm lab` commands: the number of worlds, the seed and the output folder."""

    seeds: Annotated[
        int,
        typer.Option(help="Number of random worlds per setting, each with its own noise.", min=2),
    ] = 128
    seed: Seed = 0
    out: Out = Path("runs/lab")


def _lab_verb(name: str, arguments: str = "", files: str = "") -> Callable[[Work], Work]:
    """Makes a decorator that adds a command to `selm lab`."""
    files = files or f"lab_{name}.html, lab_{name}.json and the figure lab_{name}.svg"
    return verb(
        app, name, needs="nothing, not even an accelerator",
        writes=f"{files} into the folder of --out, and a summary to the terminal",
        example=f"selm lab {name} {arguments}--seeds 16",
    )  # fmt: skip


@_lab_verb("regret")
def regret(o: Sampled) -> None:
    """Measure the regret of all algorithms.

    All landscapes are tried, and the slope of the regret is shown too.
    """
    from selm_jax.lab import experiments, page, plots

    records = _write(experiments.regret_curves(o.seeds, o.seed), o.out / "lab_regret.json")
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
    world = page.described(experiments.REGRET_SHAPE, experiments.REGRET_LENGTH)
    made = page.Made("regret", o.seeds, o.seed, "experiments.py, regret_curves", world)
    plot = plots.regret(records, o.out / "lab_regret.svg", str(made))
    found = [
        page.finding(r["against"], r["algorithm"], r["against"]["of"], r["landscape"], o.seeds)
        for r in records
        if "against" in r
    ]
    tables = [page.regret_and_slope(records)]
    page.write(
        o.out / "lab_regret.html", "The regret of all algorithms", made, found, [plot], tables
    )


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """The options of `selm lab map`."""

    landscape: Annotated[
        str, typer.Option(help="Landscape of rewards: two_peaks, needle, smooth or random.")
    ] = "two_peaks"
    dimensions: Annotated[
        str | None,
        typer.Option(help="Feature dimensions such as 4,16,tabular.", show_default="all"),
    ] = None
    sampled: Sampled


@_lab_verb("map", "--landscape needle ", "lab_map_LANDSCAPE.html, .json and two figures")
def map_(options: Mapped) -> None:
    """Map where SELM's bonus lowers regret.

    It varies alpha, noise, coverage and dimension.
    """
    from selm_jax.lab import experiments, page, plots, stats, worlds

    landscape, dimensions, o = options.landscape, options.dimensions, options.sampled
    if landscape not in worlds.LANDSCAPES:
        raise typer.BadParameter(f"landscape is {landscape!r}; expected one of {worlds.LANDSCAPES}")
    asked = experiments.MAP_DIMENSIONS if dimensions is None else _dimensions(dimensions)
    parts = experiments.optimism_map(o.seeds, o.seed, landscape=landscape, dimensions=asked)
    found = _collect(parts, "dimension")
    verb = f"map --landscape {landscape}" + (f" --dimensions {dimensions}" if dimensions else "")
    world = page.described(experiments.MAP_SHAPE, experiments.MAP_LENGTH)
    made = page.Made(verb, o.seeds, o.seed, "experiments.py, optimism_map", world)
    everything, drawn = [], []
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
        file = o.out / f"lab_map_{landscape}_{against}.svg"
        drawn.append(plots.heat_maps(records, file, f"{made}; against {against} DPO"))
        everything += records
    _write(everything, o.out / f"lab_map_{landscape}.json")
    title = f"Where SELM's bonus lowers regret: the landscape {landscape}"
    places = [
        f"dimension {r['dimension']}, coverage {r['coverage']:g}, noise {r['temperature']:g}"
        for r in everything
    ]
    shown = [
        page.finding(r, f"SELM, alpha {r['alpha']:g}", f"{r['against']} DPO", place, o.seeds)
        for r, place in zip(everything, places, strict=True)
    ]
    page.write(o.out / f"lab_map_{landscape}.html", title, made, shown, drawn)


@_lab_verb("conditions")
def conditions(o: Sampled) -> None:
    """Vary one condition at a time.

    The conditions are landscape, data, noise, reference, sampler and solver.
    """
    from selm_jax.lab import experiments, page, plots, stats

    found = stats.correct(_collect(experiments.one_at_a_time(o.seeds, o.seed), "condition"))
    records = _write(found, o.out / "lab_conditions.json")
    _print(records, ("condition", "alpha"))
    world = page.base_case()
    made = page.Made("conditions", o.seeds, o.seed, "experiments.py, one_at_a_time", world)
    file, base = o.out / "lab_conditions.svg", "the same at alpha 0 (DPO)"
    plot = plots.table(records, "alpha", "condition", file, str(made), base)
    shown = [
        page.finding(r, f"SELM, alpha {r['alpha']:g}", "DPO", r["condition"], o.seeds)
        for r in records
    ]
    page.write(file.with_suffix(".html"), "One condition at a time", made, shown, [plot])


@_lab_verb("why")
def why(o: Sampled) -> None:
    """Compare effects on data and fit.

    SELM's bonus is used only to collect data, or only to fit the policy that is evaluated.
    """
    from selm_jax.lab import experiments, page, plots, stats

    found = stats.correct(_collect(experiments.why(o.seeds, o.seed), "condition"))
    records = _write(found, o.out / "lab_why.json")
    _print(records, ("condition", "variant", "setting"))
    for r in records:
        r["variant and setting"] = f"{r['variant']}\n{r['setting']:g}"
    world = page.base_case()
    made = page.Made("why", o.seeds, o.seed, "experiments.py, why", world)
    file = o.out / "lab_why.svg"
    plot = plots.table(records, "variant and setting", "condition", file, str(made), "DPO")
    shown = [
        page.finding(
            r,
            f"{experiments.VARIANTS[r['variant']]} {r['setting']:g}",
            "DPO",
            r["condition"],
            o.seeds,
        )
        for r in records
    ]
    page.write(file.with_suffix(".html"), "Better data or a better fit?", made, shown, [plot])


@dataclass(frozen=True, kw_only=True)
class Idea:
    """The options of `selm lab idea`."""

    loss: Annotated[
        str,
        typer.Argument(
            help="Loss as in an experiment file: a name, a sum, or package.module:function."
        ),
    ]
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            help="Settings of the loss as key=value; key=a,b,c tries each value.",
            metavar="[KEY=VALUE]...",
        ),
    ] = None
    beta: Annotated[
        float, typer.Option(help="Strength of the KL penalty, in the loss and in the world.")
    ] = 0.1
    sampled: Sampled


@_lab_verb("idea", "selm alpha=0.1,1 ")
def idea(options: Idea) -> None:
    """Compare your loss with SELM and DPO.

    All losses run in the same worlds, with the same queries and seeds.
    """
    from selm_jax.lab import experiments, page, plots, stats
    from selm_jax.objectives.build import build_objective

    loss, settings, beta, o = options.loss, options.settings, options.beta, options.sampled
    choices = [_choices(setting) for setting in settings or []]
    tried = {f"selm alpha={a}": build_objective("selm", beta=beta, alpha=a) for a in (0.01, 0.1)}
    for values in itertools.product(*choices):
        name = " ".join((loss.rpartition(":")[2], *(f"{k}={v:g}" for k, v in values)))
        tried[name] = build_objective(loss, beta=beta, **dict(values))
    found = _collect(experiments.idea(tried, o.seeds, o.seed, beta=beta), "objective")
    compared = stats.correct([r for r in found if r["objective"] != "dpo"])
    records = _write(compared, o.out / "lab_idea.json")
    _print(records, ("objective", "landscape"))
    verb = " ".join(["idea", loss, *(settings or []), f"--beta {beta:g}"])
    shape = dataclasses.replace(experiments.IDEA_SHAPE, beta=beta)
    world = page.described(shape, experiments.IDEA_LENGTH)
    made = page.Made(verb, o.seeds, o.seed, "experiments.py, idea", world)
    file = o.out / "lab_idea.svg"
    plot = plots.table(records, "landscape", "objective", file, str(made), "DPO")
    shown = [page.finding(r, r["objective"], "DPO", r["landscape"], o.seeds) for r in records]
    title = f"{loss.rpartition(':')[2]} beside SELM and DPO"
    page.write(file.with_suffix(".html"), title, made, shown, [plot])


@_lab_verb("theory", files="lab_theory.html and lab_theory.json")
def theory(o: Sampled) -> None:
    """Test the paper's Theorem 5.3.

    Alpha is set as the theorem prescribes, and the regret is compared with the theorem's bound.
    """
    from selm_jax.lab import experiments, page, stats

    found = _collect(experiments.theorem(o.seeds, o.seed), "beta")
    records = _write(stats.correct(found), o.out / "lab_theory.json")
    typer.echo(
        f"{'beta':>5}{'T':>5}{'R_max':>7}{'alpha':>10}{'bound':>10}{'worst':>8}"
        "   regret at this alpha to DPO's, Holm's p"
    )
    for r in records:
        typer.echo(
            f"{r['beta']:>5g}{r['rounds']:>5}{r['r_max']:>7.2f}{r['alpha']:>10.2g}"
            f"{r['bound']:>10.2g}{r['worst']:>8.0f}{_difference(r)}"
        )
    shape = experiments.THEORY_SHAPE
    world = f"{page.of_shape(shape)}; beta as in the table; one query a round"
    made = page.Made("theory", o.seeds, o.seed, "experiments.py, theorem", world)
    shown = [
        page.finding(
            r, "SELM with the theorem's alpha", "DPO",
            f"beta {r['beta']:g} with {r['rounds']} rounds", o.seeds,
        )
        for r in records
    ]  # fmt: skip
    file = o.out / "lab_theory.html"
    page.write(file, "Theorem 5.3 in small worlds", made, shown, tables=[page.constants(records)])


@dataclass(frozen=True, kw_only=True)
class OfDecoder:
    """The options of `selm lab decoder`."""

    alphas: Annotated[str, typer.Option(help="Values of alpha, separated by commas.")] = (
        "0.01,0.1,1"
    )
    rounds: Annotated[
        int, typer.Option(help="Number of rounds, each of 8 queries and 4 updates.", min=1)
    ] = 12
    rate: Annotated[float, typer.Option(help="Adam's learning rate.")] = 1e-3
    seeds: Annotated[int, typer.Option(help="Random worlds per setting.", min=2)] = 8
    seed: Seed = 0
    out: Out = Path("runs/lab")


@_lab_verb("decoder", files="lab_decoder.html and lab_decoder.json")
def decoder(o: OfDecoder) -> None:
    """Train a tiny decoder in a small world.

    The update is that of real runs, with packed rows. SELM's exact regret is compared with DPO's.
    """
    from selm_jax.lab import decoder_world, page

    found = decoder_world.regret(_numbers(o.alphas), o.seeds, o.seed, rounds=o.rounds, rate=o.rate)
    records = _write(found, o.out / "lab_decoder.json")
    typer.echo(
        f"DPO: cumulative regret {records[0]['base']:.3f}; untrained: {records[0]['still']:.3f}"
    )
    for r in records:
        typer.echo(f"alpha {r['alpha']:<6g}{_difference(r)}")
    verb = f"decoder --alphas {o.alphas} --rounds {o.rounds} --rate {o.rate:g}"
    world = f"3 prompts, responses of up to 4 letters; {o.rounds} rounds of 8 queries and 4 updates"
    made = page.Made(verb, o.seeds, o.seed, "decoder_world.py, regret", world)
    shown = [
        page.finding(r, f"SELM, alpha {r['alpha']:g}", "DPO", "this world", o.seeds)
        for r in records
    ]
    page.write(o.out / "lab_decoder.html", "A tiny decoder in a small world", made, shown)


def _collect(parts: Iterable[list[dict[str, Any]]], name: str) -> list[dict[str, Any]]:
    """Collects the records of all parts, and prints the time since the start after each part."""
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
    """Formats a confidence interval, or "(no interval)" if low is None."""
    return "(no interval)" if low is None else f"[{low:{form}}, {high:{form}}]"


def _rounded(value: Any) -> Any:
    """Rounds nested floats to six digits, so that printed, plotted and written numbers agree."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


def _write(records: list[dict[str, Any]], file: Path) -> list[dict[str, Any]]:
    """Rounds records, writes them to a JSON file, and returns the rounded records."""
    records = _rounded(records)
    lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in records)
    artifacts.write_text(file, f"[\n{lines}\n]\n")
    typer.echo(f"numbers: {file}")
    return records


def _numbers(text: str) -> list[float]:
    try:
        return [float(x) for x in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"found {text!r}; expected numbers separated by commas") from error


def _dimensions(text: str) -> list[int | None]:
    try:
        return [None if x == "tabular" else int(x) for x in text.split(",")]
    except ValueError as error:
        raise typer.BadParameter(f"found {text!r}; expected a list such as 4,16,tabular") from error


def _choices(setting: str) -> list[tuple[str, float]]:
    key, equals, values = setting.partition("=")
    if not equals or not key.isidentifier():
        raise typer.BadParameter(f"found {setting!r}; expected key=value or key=a,b,c")
    return [(key, value) for value in _numbers(values)]
