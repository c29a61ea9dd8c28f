"""`selm plan`: predicts whether an experiment fits, how long it takes and what it costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from selm_jax.config import as_dict
from selm_jax.models.config import DecoderConfig, UnsupportedModel
from selm_jax.models.decoder import active_parameters, parameter_count
from selm_jax.models.families import from_hf
from selm_jax.plan.examine import Load, Options, Plan, examine
from selm_jax.plan.measure import versions
from selm_jax.plan.table import show
from selm_jax.plan.topology import Target, has_libtpu, local_target, target
from selm_jax.run.task import task_of
from selm_jax.shell import artifacts
from selm_jax.shell.json_file import JsonFileError, read_object
from selm_jax.shell.progress import terminal
from selm_jax.weights.facts import config_json

DOES_NOT_FIT = 3  # exit status


def main(
    load: Load,
    topologies: Sequence[str],
    *,
    config: Path | None = None,
    out: Path | None = None,
    options: Options = Options(),  # noqa: B008 (frozen)
    console: Console | None = None,
) -> int:
    """Prints a plan for each topology, or for the local devices.

    Args:
      load: loads the experiment with further overrides.
      config: a config.json to use instead of the model's own.
      out: file for the plans as JSON.

    Returns:
      The exit status: 0, or 3 if a plan does not fit.

    Raises:
      TopologyError: if a topology is unknown.
      SourceError, UnsupportedModel: if there is no config.json, or its model is not supported.
    """
    console = console or terminal()
    targets = _targets(topologies, options.hbm, console)
    e = load(())
    file = config or config_json(e.model.source, e.model.revision)
    facts = task_of(e.objective).facts(read_facts(file), file, pad=lambda: 0)
    console.print(f"model: the facts of {file}", highlight=False, soft_wrap=True, markup=False)
    if facts.mixture is not None:
        console.print(
            f"{parameter_count(facts):,} parameters, {active_parameters(facts):,} of them active "
            "for each token",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    plans = []
    for each in targets:
        plans.append(examine(load, facts, each, options, console))
        show(plans[-1], options, console)
    if out is not None:
        artifacts.write_json(out, {"versions": versions(), "plans": [plain(p) for p in plans]})
    return 0 if all(plan.fit for plan in plans) else DOES_NOT_FIT


def read_facts(file: Path) -> DecoderConfig:
    """Reads a model's hyperparameters from its config.json; the file may have any name."""
    try:
        return from_hf(read_object(file))
    except JsonFileError as e:
        raise UnsupportedModel(str(e)) from e
    except UnsupportedModel as e:
        raise UnsupportedModel(f"{file}: {e}") from e


def _targets(names: Sequence[str], hbm: float | None, console: Console) -> list[Target]:
    if not names:
        return [local_target(hbm)]
    if not has_libtpu():
        console.print(
            f"libtpu is not installed, so nothing can be compiled for {', '.join(names)}: this is "
            "a plan for the local devices. `pip install 'selm_jax[tpu]'` installs it on any Linux "
            "machine, with or without a TPU",
            style="yellow", highlight=False, soft_wrap=True,
        )  # fmt: skip
        return [local_target(hbm)]
    jax.config.update("jax_platforms", "cpu")  # compiling must not occupy local TPU chips
    return [target(name, hbm) for name in names]


def plain(plan: Plan) -> dict[str, Any]:
    """Converts a plan to JSON values."""
    where = plan.target
    return {
        "target": {
            "name": where.name, "chips": where.chips, "devices": len(where.devices),
            "hbm": where.hbm, "hbm_from": where.hbm_from,
        },
        "experiment": as_dict(plan.experiment),
        "mesh": plan.mesh,
        "fits": plan.fit,
        "problem": plan.problem,
        "programs": [
            dataclasses.asdict(f) | {"needed": f.needed, "fits": f.fits} for f in plan.fits
        ],
        "lengths": dataclasses.asdict(plan.lengths),
        "work": None if plan.work is None else dataclasses.asdict(plan.work)
        | {"flop": plan.work.flop, "hours": plan.work.hours},
        "change": plan.change,
        "instead": plan.instead,
        "tried": plan.tried,
        "sizes": plan.sizes,
    }  # fmt: skip
