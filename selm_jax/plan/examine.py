"""Plans an experiment for given devices: compiles, counts work, and finds settings that fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from selm_jax.config import Experiment
from selm_jax.models.config import DecoderConfig
from selm_jax.parallel.mesh import MeshError
from selm_jax.plan import work
from selm_jax.plan.measure import Memory, measure
from selm_jax.plan.phases import Blueprint, Phase, phases
from selm_jax.plan.remedies import Change, Fits, remedy
from selm_jax.plan.topology import Target, target
from selm_jax.shell.memory import gib

Load = Callable[[Sequence[str]], Experiment]  # loads the experiment with further overrides


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of `selm plan` on data and devices; None takes a value from data or settings.

    Attributes:
      mfu, mbu: see `work.Assumed`.
      hbm: memory per device in GiB, overriding the target's own value.
      price: dollars per chip-hour.
      tries: how many changes may be compiled in search of a remedy.
    """

    data_rows: int | None = None
    heldout_rows: int | None = None
    prompt_tokens: int | None = None
    response_tokens: int | None = None
    mfu: float = 0.4
    mbu: float = 0.6
    hbm: float | None = None
    price: float | None = None
    tries: int = 8


@dataclasses.dataclass(frozen=True)
class Fit:
    """The memory that one program needs on a device, and the memory that the device has."""

    name: str
    stage: str
    memory: Memory
    held: dict[str, int]
    hbm: int

    @property
    def needed(self) -> int | None:
        """The peak bytes on a device; None if the compiler refused without giving a number."""
        return None if self.memory.peak < 0 else self.memory.peak + sum(self.held.values())

    @property
    def fits(self) -> bool:
        return self.memory.refused is None and self.needed is not None and self.needed <= self.hbm


@dataclasses.dataclass(frozen=True)
class Plan:
    """The plan of an experiment for one target, that is, one set of devices.

    Attributes:
      problem: why nothing could be compiled: the mesh does not fit the model or the batch.
      change: overrides that make the plan fit; None if it fits already, or if none were found.
      instead: a larger slice, if the experiment fits only there (with `change`).
      tried: the changes that were compiled, in words.
      sizes: the sizes of batches that were chosen, and why, in one line.
    """

    target: Target
    experiment: Experiment
    mesh: dict[str, int]
    fits: tuple[Fit, ...]
    lengths: work.Lengths
    work: work.Work | None
    problem: str | None = None
    change: Change | None = None
    instead: str | None = None
    tried: tuple[str, ...] = ()
    sizes: str = ""

    @property
    def fit(self) -> bool:
        return self.problem is None and all(each.fits for each in self.fits)


def examine(
    load: Load, facts: DecoderConfig, where: Target, options: Options, console: Console
) -> Plan:
    """Compiles all programs and, if they do not fit, looks for changes that make them fit."""
    plan = compiled(load(()), facts, where, options, console)
    if plan.fit or not options.tries:
        return plan
    tried: list[str] = []

    def try_it(change: Change, on: Target, stage: str | None) -> bool:
        if len(tried) >= options.tries:
            return False
        other = compiled(load(change), facts, on, options, console, stage)
        words = [f"{f.name} {gib(f.needed)} GiB" if f.needed else f.name for f in other.fits
                 if not f.fits]  # fmt: skip
        said = other.problem or (", ".join(words) if words else "fits")
        tried.append(f"{' '.join(change) or 'as it is'} on {on.name}: {said}")
        console.print(f"  tried {tried[-1]}", style="dim", highlight=False, soft_wrap=True)
        return other.fit

    b = Blueprint(load(()), facts, where)
    change, instead = _change(plan, b, lambda change, stage: try_it(change, where, stage)), None
    if change and not compiled(load(change), facts, where, options, console).fit:
        change = None  # a change that helps one stage makes another one too large
    if not change:
        # Try more chips. There must be at least as many rows as chips.
        rows = b.experiment.training.rows
        for name in where.larger:
            larger = target(name, options.hbm)
            few = rows != "auto" and rows < len(larger.devices)
            more = (f"training.rows={len(larger.devices)}",) if few else ()
            if try_it(more, larger, None):
                change, instead = more, name
                break
    return dataclasses.replace(plan, change=change, instead=instead, tried=tuple(tried))


def _change(plan: Plan, b: Blueprint, fits: Fits) -> Change | None:
    devices = len(plan.target.devices)
    if plan.problem:
        parts, rows = devices // b.experiment.compute.tensor, b.experiment.training.rows
        if rows == "auto":
            return None
        more = (f"training.rows={-(-rows // parts) * parts}",)
        return more if fits(more, None) else None
    stages = list(dict.fromkeys(each.stage for each in plan.fits if not each.fits))
    return remedy(b.experiment, b.programs.batches, stages, devices, b.longest_example, fits)


def compiled(
    e: Experiment,
    facts: DecoderConfig,
    where: Target,
    options: Options,
    console: Console,
    stage: str | None = None,
) -> Plan:
    """Makes a plan by compiling all programs, or only those of one stage."""
    b, o = Blueprint(e, facts, where), options
    lengths = work.lengths_of(b, o.data_rows, o.heldout_rows, o.prompt_tokens, o.response_tokens)
    nothing = Plan(where, e, {}, (), lengths, None)
    try:
        nothing = dataclasses.replace(nothing, mesh=dict(b.devices.mesh.shape))
        # With `auto` an update of long examples may need more batches than one of mean length.
        batches = 2 if e.training.row_length == "auto" else work.packed(b, lengths).batches
        programs = [p for p in phases(b, batches) if stage in (None, p.stage)]
        todo = work.work_of(b, lengths, work.Assumed(o.mfu, o.mbu))
    except MeshError as error:
        return dataclasses.replace(nothing, problem=str(error))
    fits = tuple(_fit(program, where, console) for program in programs)
    return dataclasses.replace(nothing, fits=fits, work=todo, sizes=b.told)


def _fit(phase: Phase, where: Target, console: Console) -> Fit:
    with console.status(Text(f"{where.name}: compiling {phase.name}")):
        memory = measure(phase.lower(), where)
    return Fit(phase.name, phase.stage, memory, dict(phase.held), where.hbm)
