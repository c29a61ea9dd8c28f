"""The commands of `selm lab`, which run experiments in small worlds."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from selm_jax.lab import acquire_command, compare_command
from selm_jax.lab.verbs import (
    Out,
    Sampled,
    Seed,
    app,
    collect,
    difference,
    ends,
    lab_verb,
    rounded,
    show,
    write,
)

__all__ = ["acquire_command", "app", "compare_command"]  # imported for their commands


@lab_verb("regret")
def regret(o: Sampled) -> None:
    """Measure the regret of all algorithms.

    All landscapes are tried, and the slope of the regret is shown too.
    """
    from selm_jax.lab import experiments, page, plots

    records = write(experiments.regret_curves(o.seeds, o.seed), o.out / "lab_regret.json")
    typer.echo(
        f"{'algorithm':<15}{'landscape':<11}{'regret, 95 %':>22}{'slope, 95 %':>20}"
        "   difference, Holm's p"
    )
    for r in records:
        total = f"{r['mean'][-1]:.2f} {ends(r['low'][-1], r['high'][-1], '.2f')}"
        slope = f"{r['slope']:.2f} {ends(r['slope_low'], r['slope_high'], '.2f')}"
        typer.echo(
            f"{r['algorithm']:<15}{r['landscape']:<11}{total:>22}{slope:>20}"
            + (f"{difference(r['against'])} {r['against']['of']}" if "against" in r else "")
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


@lab_verb("map", "--landscape needle ", "lab_map_LANDSCAPE.html, .json and two figures")
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
    found = collect(parts, "dimension")
    verb = f"map --landscape {landscape}" + (f" --dimensions {dimensions}" if dimensions else "")
    world = page.described(experiments.MAP_SHAPE, experiments.MAP_LENGTH)
    made = page.Made(verb, o.seeds, o.seed, "experiments.py, optimism_map", world)
    everything, drawn = [], []
    for against in ("online", "passive"):
        records = rounded(stats.correct([r for r in found if r["against"] == against]))
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
    write(everything, o.out / f"lab_map_{landscape}.json")
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


@lab_verb("conditions")
def conditions(o: Sampled) -> None:
    """Vary one condition at a time.

    The conditions are landscape, data, noise, reference, sampler and solver.
    """
    from selm_jax.lab import experiments, page, plots, stats

    found = stats.correct(collect(experiments.one_at_a_time(o.seeds, o.seed), "condition"))
    records = write(found, o.out / "lab_conditions.json")
    show(records, ("condition", "alpha"))
    world = page.base_case()
    made = page.Made("conditions", o.seeds, o.seed, "experiments.py, one_at_a_time", world)
    file, base = o.out / "lab_conditions.svg", "the same at alpha 0 (DPO)"
    plot = plots.table(records, "alpha", "condition", file, str(made), base)
    shown = [
        page.finding(r, f"SELM, alpha {r['alpha']:g}", "DPO", r["condition"], o.seeds)
        for r in records
    ]
    page.write(file.with_suffix(".html"), "One condition at a time", made, shown, [plot])


@lab_verb("why")
def why(o: Sampled) -> None:
    """Compare effects on data and fit.

    SELM's bonus is used only to collect data, or only to fit the policy that is evaluated.
    """
    from selm_jax.lab import experiments, page, plots, stats

    found = stats.correct(collect(experiments.why(o.seeds, o.seed), "condition"))
    records = write(found, o.out / "lab_why.json")
    show(records, ("condition", "variant", "setting"))
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


@lab_verb("idea", "selm alpha=0.1,1 ")
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
    found = collect(experiments.idea(tried, o.seeds, o.seed, beta=beta), "objective")
    compared = stats.correct([r for r in found if r["objective"] != "dpo"])
    records = write(compared, o.out / "lab_idea.json")
    show(records, ("objective", "landscape"))
    verb = " ".join(["idea", loss, *(settings or []), f"--beta {beta:g}"])
    shape = dataclasses.replace(experiments.IDEA_SHAPE, beta=beta)
    world = page.described(shape, experiments.IDEA_LENGTH)
    made = page.Made(verb, o.seeds, o.seed, "experiments.py, idea", world)
    file = o.out / "lab_idea.svg"
    plot = plots.table(records, "landscape", "objective", file, str(made), "DPO")
    shown = [page.finding(r, r["objective"], "DPO", r["landscape"], o.seeds) for r in records]
    title = f"{loss.rpartition(':')[2]} beside SELM and DPO"
    page.write(file.with_suffix(".html"), title, made, shown, [plot])


@lab_verb("theory", files="lab_theory.html and lab_theory.json")
def theory(o: Sampled) -> None:
    """Test the paper's Theorem 5.3.

    Alpha is set as the theorem prescribes, and the regret is compared with the theorem's bound.
    """
    from selm_jax.lab import experiments, page, stats

    found = collect(experiments.theorem(o.seeds, o.seed), "beta")
    records = write(stats.correct(found), o.out / "lab_theory.json")
    typer.echo(
        f"{'beta':>5}{'T':>5}{'R_max':>7}{'alpha':>10}{'bound':>10}{'worst':>8}"
        "   regret at this alpha to DPO's, Holm's p"
    )
    for r in records:
        typer.echo(
            f"{r['beta']:>5g}{r['rounds']:>5}{r['r_max']:>7.2f}{r['alpha']:>10.2g}"
            f"{r['bound']:>10.2g}{r['worst']:>8.0f}{difference(r)}"
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


@lab_verb("decoder", files="lab_decoder.html and lab_decoder.json")
def decoder(o: OfDecoder) -> None:
    """Train a tiny decoder in a small world.

    The update is that of real runs, with packed rows. SELM's exact regret is compared with DPO's.
    """
    from selm_jax.lab import decoder_world, page

    found = decoder_world.regret(_numbers(o.alphas), o.seeds, o.seed, rounds=o.rounds, rate=o.rate)
    records = write(found, o.out / "lab_decoder.json")
    typer.echo(
        f"DPO: cumulative regret {records[0]['base']:.3f}; untrained: {records[0]['still']:.3f}"
    )
    for r in records:
        typer.echo(f"alpha {r['alpha']:<6g}{difference(r)}")
    verb = f"decoder --alphas {o.alphas} --rounds {o.rounds} --rate {o.rate:g}"
    world = f"3 prompts, responses of up to 4 letters; {o.rounds} rounds of 8 queries and 4 updates"
    made = page.Made(verb, o.seeds, o.seed, "decoder_world.py, regret", world)
    shown = [
        page.finding(r, f"SELM, alpha {r['alpha']:g}", "DPO", "this world", o.seeds)
        for r in records
    ]
    page.write(o.out / "lab_decoder.html", "A tiny decoder in a small world", made, shown)


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
