"""Prints a plan as tables and sentences."""

from __future__ import annotations

import shlex

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from rich.text import Text

from selm_jax.plan.examine import Fit, Options, Plan
from selm_jax.plan.loops import LEAST
from selm_jax.plan.measure import versions
from selm_jax.plan.work import Part
from selm_jax.shell.memory import GIB, gib

_LEGEND = (
    "args, temps: arguments, temporaries; beside: other data in memory at the same time; needs: "
    "peak; s: seconds to compile\n"
)


def show(plan: Plan, options: Options, console: Console) -> None:
    """Prints a plan: memory of each program, work of an iteration, assumptions, verdict."""
    where = plan.target
    console.print()
    console.rule(Text(where.name, "bold"), align="left")
    _say(
        console,
        f"{where.chips} chip{'s' * (where.chips > 1)}, {where.hbm / GIB:.2f} GiB for programs on "
        f"each of {len(where.devices)} device{'s' * (len(where.devices) > 1)} ({where.hbm_from}); "
        + ", ".join(f"{name} {version}" for name, version in versions().items()),
    )
    if plan.mesh:
        _say(console, "mesh: " + ", ".join(f"{axis} {n}" for axis, n in plan.mesh.items()))
    if plan.sizes:
        _say(console, plan.sizes)
    if plan.fits:
        console.print(_memory(plan))
        _say(console, _LEGEND)
        _loops(plan, console)
    if plan.work is not None:
        console.print(_hours(plan))
        _iterations(plan, options, console)
    for each in plan.lengths.assumed:
        _say(console, f"assumed: {each}")
    _verdict(plan, console)


def _memory(plan: Plan) -> Table:
    table = _table("GiB on one device", "program")
    for head in ("args", "temps", "output", "beside", "needs", "fits", "s"):
        table.add_column(head, justify="right", no_wrap=True)
    for each in plan.fits:
        m = each.memory
        sizes = [gib(n) if n >= 0 else "" for n in (m.arguments, m.temporaries, m.output)]
        beside = "\n".join(f"{what} {gib(n)}" for what, n in each.held.items())
        needed = "?" if each.needed is None else gib(each.needed)
        style = "" if each.fits else "bold red"
        table.add_row(
            each.name, *sizes, beside, needed, left(each), f"{m.seconds:.0f}", style=style
        )
    return table


def _loops(plan: Plan, console: Console) -> None:
    """Says how many collectives are in loops, and warns of those that are there needlessly."""
    counts = [f"{f.name} {f.memory.in_loops}" for f in plan.fits if f.memory.in_loops]
    if counts:
        size = f"{LEAST // 2**20} MiB or more"
        _say(console, f"collectives of {size} in each turn of a loop: {', '.join(counts)}")
    for each in plan.fits:
        for what in each.memory.again:
            _say_first(
                console, each.name,
                f": every turn of a loop repeats the same collective ({what}), which takes time on "
                "the network. Another mesh may avoid it (compute.fsdp, compute.tensor)",
                "yellow",
            )  # fmt: skip


def _table(title: str, first: str) -> Table:
    table = Table(
        title=title,
        title_justify="left",
        title_style="",
        box=SIMPLE,
        pad_edge=False,
        padding=(0, 1, 0, 0),
    )
    table.add_column(first, no_wrap=True)
    return table


def left(each: Fit) -> str:
    """Says how much device memory is left, or how much more than all of it a program needs."""
    if each.fits and each.needed is not None:
        return f"{gib(each.hbm - each.needed)} left"
    return "no" if each.needed is None else f"{gib(each.needed - each.hbm)} over"


def _hours(plan: Plan) -> Table:
    assert plan.work is not None
    table = _table("one iteration", "work")
    for head in ("tokens", "PFLOP", "hours"):
        table.add_column(head, justify="right")
    for part in plan.work.parts:
        table.add_row(*_row(part))
    whole = Part(
        "together", sum(p.tokens for p in plan.work.parts), plan.work.flop, plan.work.hours
    )
    table.add_section()
    table.add_row(*_row(whole), style="bold")
    return table


def _row(part: Part) -> tuple[str, str, str, str]:
    hours = "unknown" if part.hours is None else f"{part.hours:.2f}"
    pflop = part.flop / 1e15
    return part.name, f"{part.tokens:,}", f"{pflop:,.0f}" if pflop > 100 else f"{pflop:.3g}", hours


def _iterations(plan: Plan, options: Options, console: Console) -> None:
    w, e, where = plan.work, plan.experiment, plan.target
    assert w is not None
    _say(
        console,
        f"{plan.lengths.prompts:,} prompts, {w.updates} updates of {e.training.global_batch} "
        f"examples in {w.batches} batch{'es' * (w.batches > 1)} of {w.rows} x "
        f"{w.row_length} tokens; {w.useful / max(w.padded, 1):.0%} of these are not "
        "padding",
    )
    hours = w.hours_of_run(e.iterations)
    if hours is None:
        known = {"peak arithmetic": where.peak, "memory bandwidth": where.bandwidth}
        missing = " and ".join(what for what, value in known.items() if value is None)
        _say(console, f"hours unknown: no {missing} of {where.name} is known")
        return
    cost = "" if options.price is None else f", ${hours * where.chips * options.price:,.0f}"
    _say_first(
        console,
        f"{e.iterations} iteration{'s' * (e.iterations > 1)}: {hours:.1f} hours, "
        f"{hours * where.chips:,.0f} chip hours{cost}",
        f" at {options.mfu:.0%} of peak FLOP/s and {options.mbu:.0%} of memory bandwidth "
        "(--mfu, --mbu); loading, compiling and saving are not counted",
    )


def _verdict(plan: Plan, console: Console) -> None:
    name = plan.target.name
    if plan.fit:
        tight = min((1 - f.needed / f.hbm for f in plan.fits if f.needed is not None), default=1)
        _say_first(console, "FITS", f" on {name}, {tight:.0%} to spare", "bold green")
        return
    _say_first(console, "DOES NOT FIT", f" on {name}", "bold red")
    if plan.problem:
        _say(console, f"  {plan.problem}")
    for each in plan.fits:
        if each.memory.refused:
            _say(console, f"  {each.name}: {each.memory.refused}")
    if plan.instead:
        _say_first(console, "it fits on", f"  --topology {plan.instead}")
    if plan.change:
        _say_first(console, "it fits with", f"  {shlex.join(plan.change)}")
    elif plan.tried and not plan.instead:
        _say(
            console,
            f"none of the {len(plan.tried)} changes tried is enough; raise --tries to try more",
        )


def _say(console: Console, text: str) -> None:
    console.print(Text(text), soft_wrap=True)


def _say_first(console: Console, first: str, rest: str, style: str = "bold") -> None:
    """Prints a line whose first part is highlighted."""
    console.print(Text.assemble((first, style), rest))
