"""A stage uses only what it was given: its step has no reference to the run.

Its programs read only those settings of the experiment that the stage declares.
"""

from __future__ import annotations

import dataclasses
import functools
from types import MethodType

import pytest
import tiny
from rich.console import Console

from selm_jax import config
from selm_jax.iterate import iterate
from selm_jax.run.data import Data
from selm_jax.run.devices import Devices
from selm_jax.run.model import StartModel
from selm_jax.run.programs import Programs
from selm_jax.run.run import Run
from selm_jax.stages.declared import FREE
from selm_jax.stages.stage import Stage
from selm_jax.stages.step import Step

QUIET = Console(quiet=True)
# The devices do not change the result. `remat` and the objective are not used in a forward pass,
# although the object that has its functions is built from them.
OF_PLACES = ("compute.", "training.remat", "training.clip")
OF_THE_UPDATE = (
    "training.optimizer",
    "training.b1",
    "training.b2",
    "training.eps",
    "training.weight_decay",
    "training.on_nonfinite",
    "training.token_statistics",
    "training.router",
)
STAGES = {"generate", "rank", "score", "train", "export", "evaluate"}


def leads_to(start: object) -> set[type]:
    """The classes of this package with objects that attributes and bound arguments lead to."""
    found, seen, todo = set(), set(), [start]
    while todo:
        each = todo.pop()
        if id(each) in seen:
            continue
        seen.add(id(each))
        if isinstance(each, functools.partial):
            todo += [each.func, *each.args, *each.keywords.values()]
        elif isinstance(each, MethodType):
            todo.append(each.__self__)
        elif callable(each) and getattr(each, "__closure__", None):
            todo += [cell.cell_contents for cell in each.__closure__]
        elif isinstance(each, dict):
            todo += list(each.values())
        elif isinstance(each, list | tuple):
            todo += list(each)
        elif type(each).__module__.startswith("selm_jax"):
            found.add(type(each))
            todo += list(getattr(each, "__dict__", {}).values())
    return found


class Recorded:
    """Settings that note by dotted key what is read of them."""

    def __init__(self, group, read: set[str], prefix: str = ""):
        self.__dict__.update(group=group, read=read, prefix=prefix)

    def __getattr__(self, name):
        value, key = getattr(self.group, name), self.prefix + name
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return Recorded(value, self.read, key + ".")
        self.read.add(key)
        return value


def covers(declared: str, read: str) -> bool:
    """Whether a declared key or group covers what is read: a key, or a group that is None."""
    return f"{read}.".startswith(f"{declared}.") or declared.startswith(f"{read}.")


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """For each stage of a whole run: where its step leads, and the settings its programs read."""
    found: dict[str, tuple[set[type], set[str]]] = {}
    call = Stage.__call__

    def watched(self: Stage, run, t, *given, **named):
        body, read = self.body, set[str]()

        @functools.wraps(body)
        def work(step: Step, *inputs, **others):
            experiment = Recorded(run.experiment, read)
            devices = Devices(Recorded(run.experiment.compute, read, "compute."), run.devices.chips)
            sizes, p = run.programs.sizes, run.programs
            programs = Programs(
                experiment, run.task, p.config, sizes, p.stop_ids, devices, p.batches
            )
            leads = leads_to(step)
            counts = body(dataclasses.replace(step, programs=programs), *inputs, **others)
            declared = self.keys(run)
            loose = {
                key for key in read - FREE
                if not key.startswith(OF_PLACES)
                and not any(covers(each, key) for each in declared)
            }  # fmt: skip
            found[self.name] = leads, loose
            return counts

        return call(dataclasses.replace(self, body=work), run, t, *given, **named)

    with pytest.MonkeyPatch.context() as patch:
        tiny.on_first_device(patch)
        patch.setattr(Stage, "__call__", watched)
        file = tiny.experiment(
            tmp_path_factory.mktemp("observed"), iterations=1, training__learning_rate=1e-3,
            data__limit=8, training__global_batch=2,
        )  # fmt: skip
        iterate(Run(config.load(file), QUIET))
    assert set(found) == STAGES
    return found


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_step_leads_to_no_run(observed, stage):
    leads, _ = observed[stage]
    assert Step in leads and Programs in leads
    assert not {Run, Data, StartModel} & leads


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_what_programs_read_is_declared(observed, stage):
    _, loose = observed[stage]
    allowed = () if stage == "train" else OF_THE_UPDATE
    assert {key for key in loose if not key.startswith(allowed)} == set()
