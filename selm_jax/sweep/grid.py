"""Reads a sweep file and lists the runs of its grid."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import field
from pathlib import Path
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from selm_jax.commands.tiny import shrink
from selm_jax.config import ConfigError, Experiment, as_dict, load
from selm_jax.config.file import explained, listed, read_with_places
from selm_jax.parallel import multihost
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.paths import claim, place
from selm_jax.shell.progress import terminal
from selm_jax.shell.ranges import Seed
from selm_jax.shell.storage import is_url


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class File:
    """The content of a sweep file."""

    output: str  # the sweep's folder, also in a bucket
    base: str  # the experiment file; a relative path starts at the sweep file's own folder
    grid: dict[str, dict[str, dict[str, Any]] | list[Any]]
    seeds: tuple[Seed, ...] = (42,)
    set: dict[str, Any] = field(default_factory=dict)  # of every run, by dotted key
    baseline: dict[str, str] | None = None  # axis and level; None: the last axis's first level
    title: str | None = None
    about: str = ""  # what is asked, for the page


@dataclasses.dataclass(frozen=True)
class Cell:
    """One cell of a sweep's grid: a level of each axis, and the settings that the levels change."""

    levels: Mapping[str, str]
    changes: Mapping[str, Any]  # by dotted key, in the order of the axes

    @property
    def name(self) -> str:
        return ", ".join(self.levels.values())

    @property
    def told(self) -> tuple[str, ...]:
        """The cell's changes to settings, each written as `key=value`."""
        return tuple(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in self.changes.items())

    @property
    def folder(self) -> Path:
        return Path(*(re.sub(r"[^\w.+=-]+", "-", level) for level in self.levels.values()))


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep: a cell of the grid with a seed."""

    cell: Cell
    seed: int
    experiment: Experiment

    @property
    def folder(self) -> Path:
        """The run's folder, or its mirror."""
        return mirrors.local(self.experiment.output)


@dataclasses.dataclass(frozen=True)
class Sweep:
    """A sweep whose file has been checked: every member's experiment is valid."""

    folder: Path  # or its mirror
    title: str
    about: str
    command: str
    axis: str  # that is compared along
    baseline: str  # its level that the others are compared with
    members: tuple[Member, ...]

    @property
    def cells(self) -> list[Cell]:
        return list({id(m.cell): m.cell for m in self.members}.values())


def read_sweep(
    file: Path,
    overrides: Sequence[str] = (),
    *,
    base: str | None = None,
    output: str | None = None,
    seeds: Sequence[int] | None = None,
    tiny: bool = False,
) -> Sweep:
    """Reads a sweep file and lists its runs. None of them is started.

    Args:
      overrides: `key.path=value`, applied to every run before the changes of its cell.
      base, output, seeds: replace the file's own. A relative `base` starts at the working folder.
      tiny: each experiment becomes a small rehearsal, and the sweep's folder ends in -tiny.

    Raises:
      ConfigError: the file or one of its experiments is invalid, or two cells are the same.
      PathError: with `tiny`, the sweep's folder holds files of another program; or `output` is
        the URL of something else than a folder in a bucket.
      StorageError: `output` is in a bucket, and the package for buckets is not installed.
    """
    said = _file(file)
    output, seeds = output or said.output, tuple(seeds or said.seeds)
    from_file = _base(file, said.base) if base is None else place(base)
    folder = mirrors.entered(f"{output.rstrip('/')}-tiny" if tiny else output)
    axes = {name: _levels(file, name, axis) for name, axis in said.grid.items()}
    axis, level = _baseline(file, said.baseline, axes)
    members = []
    cells = [_cell(axes, chosen) for chosen in itertools.product(*axes.values())]
    for seed, cell in itertools.product(seeds, cells):
        if "seed" in cell.changes:
            raise ConfigError(f"{file}: cell {cell.name} sets seed. List seeds in `seeds` instead")
        where = mirrors.named(folder / cell.folder / f"seed_{seed}")
        changes = [*said.set.items(), *overrides, *cell.changes.items()]
        changes += [("seed", seed), ("output", where)]
        try:
            experiment = load(from_file, changes)
        except ConfigError as e:
            raise ConfigError(f"{file}, cell {cell.name}: {e}") from None
        members.append(Member(cell, seed, experiment))
    _check_distinct(file, members)
    if tiny:  # their inputs are written now
        if not is_url(output):
            multihost.on_first(lambda: claim(folder))
        members = [_tiny(member) for member in members]
    command = shlex.join(
        ["selm", "sweep", str(file), *overrides]
        + (["--base", base] if base is not None else [])
        + (["--output", output] if output != said.output else [])
        + (["--seeds", ",".join(map(str, seeds))] if seeds != said.seeds else [])
        + (["--tiny"] if tiny else [])
    )
    title = said.title or Path(file).stem
    return Sweep(folder, title, said.about, command, axis, level, tuple(members))


def _base(file: Path, name: str) -> Path:
    """The base experiment file of a sweep, found relative to the sweep file's folder.

    Raises:
      ConfigError: the file exists only under the working directory, which earlier versions used.
    """
    found = file.parent / Path(name).expanduser()
    if not found.exists() and (old := place(name)).exists():
        beside = os.path.relpath(old, file.parent)
        raise ConfigError(
            f"{file}: base: {name} is relative to the sweep file's own folder, and {found} does "
            f"not exist. Write `base: {beside}`"
        )
    return found


def _file(file: Path) -> File:
    tree, places = read_with_places(file)
    try:
        return TypeAdapter(File).validate_python(tree)
    except ValidationError as e:
        raise ConfigError(listed(f"{file}: not a sweep", explained(e, File), places)) from None


def _levels(file: Path, name: str, axis: Mapping[str, Any] | Sequence[Any]) -> dict[str, Any]:
    """Returns the changes to settings that each level of an axis makes, by the level's name."""
    if isinstance(axis, Mapping):
        levels = dict(axis)
    else:
        levels = {
            value if isinstance(value, str) else json.dumps(value): {name: value} for value in axis
        }
    if not levels:
        raise ConfigError(f"{file}: the axis {name} has no levels; list at least one")
    return levels


def _baseline(
    file: Path, said: Mapping[str, str] | None, axes: Mapping[str, Mapping[str, Any]]
) -> tuple[str, str]:
    if not axes:
        raise ConfigError(f"{file}: grid has no axis. Add one, or use `selm run`")
    if said is None:
        name = list(axes)[-1]
        return name, next(iter(axes[name]))
    if len(said) != 1:
        raise ConfigError(f"{file}: baseline names {len(said)} axes; name one axis and its level")
    ((name, level),) = said.items()
    if name not in axes or level not in axes[name]:
        known = "; ".join(f"{axis}: {', '.join(levels)}" for axis, levels in axes.items())
        raise ConfigError(f"{file}: baseline {name}: {level} is not in the grid: {known}")
    return name, level


def _cell(axes: Mapping[str, Mapping[str, Any]], chosen: Sequence[str]) -> Cell:
    changes: dict[str, Any] = {}
    for levels, level in zip(axes.values(), chosen, strict=True):
        for key, value in levels[level].items():
            changes.pop(key, None)  # the later axis counts, at its place
            changes[key] = value
    return Cell(dict(zip(axes, chosen, strict=True)), changes)


def _check_distinct(file: Path, members: Sequence[Member]) -> None:
    """Raises ConfigError if two runs have the same folder or the same settings."""
    names: dict[str, str] = {}
    for m in members:
        name = f"{m.cell.name}, seed {m.seed}"
        settings = as_dict(m.experiment)
        where = settings.pop("output")
        if (other := names.setdefault(where, name)) != name:
            raise ConfigError(
                f"{file}: the runs {other!r} and {name!r} would use the same folder, {where}. "
                "Rename a level"
            )
        if (other := names.setdefault(json.dumps(settings), name)) != name:
            raise ConfigError(
                f"{file}: the runs {other!r} and {name!r} have the same settings. Change or remove "
                "one of them"
            )


def _tiny(member: Member) -> Member:
    e = member.experiment
    small = shrink(e, terminal(quiet=True))
    return dataclasses.replace(member, experiment=dataclasses.replace(small, output=e.output))
