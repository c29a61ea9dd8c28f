"""Compares every arm of `arms` with plain online DPO, in six landscapes and eight conditions.

Queries, worlds and random numbers are equal. A strength is chosen on other worlds than those that
are reported: for each place its own (`best`), and one for all places (`one`). Where a method bends
the fit, two further runs say what part of its effect is the data that it asks for (`data`: a plain
DPO fit to them is judged) and what part is the fit (`fit`: its fit to plain DPO's data is judged).
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from selm_jax.lab import contest, stats
from selm_jax.lab.algorithms import Length
from selm_jax.lab.arms import ARMS, BASELINE, BENDS, SAMPLERS, Arm
from selm_jax.lab.many import ASSUMED
from selm_jax.lab.stats import Record
from selm_jax.lab.worlds import LANDSCAPES, WorldShape

SHAPE = WorldShape(prompts=8, responses=16, dimension=16)
LENGTH = Length(rounds=16, queries=4)
BLOCK = 64  # the most seeds that one call runs together
THREADS = 2
EFFECTS = ("best", "one", "data", "fit")


@dataclass(frozen=True)
class Place:
    """A landscape under a condition; `dimension` None means a table instead of features."""

    landscape: str
    condition: str = "base"
    coverage: float = 0.05
    temperature: float = 0.1
    dimension: int | None = 16
    moving: bool = False

    def __str__(self) -> str:
        return f"{self.landscape}, {self.condition}"


CONDITIONS = {
    "base": {},
    "no noise": {"temperature": 0.0},
    "more noise": {"temperature": 0.3},
    "thin coverage": {"coverage": 0.002},
    "thick coverage": {"coverage": 0.2},
    "4 features": {"dimension": 4},
    "table": {"dimension": None},
    "moving reference": {"moving": True},
}
SEPARATED = ("base", "thin coverage")
PLACES = tuple(
    Place(landscape, name, **changed)
    for landscape in LANDSCAPES
    for name, changed in CONDITIONS.items()
)


class Task(NamedTuple):
    """An arm in a place; `asker` and `judged` say which of the two policies has its bend."""

    arm: Arm
    place: Place
    strength: float = 1.0
    asker: bool = True
    judged: bool = True

    def entry(self) -> contest.Entry:
        place, own = self.place, (self.asker, self.judged)
        # Where only the fit is bent, the data are plain DPO's, and so is who writes them.
        sampler = self.arm.sampler if self.asker else BASELINE.sampler
        bends = [bend.name for bend in BENDS]
        whole = {
            "landscape": LANDSCAPES.index(place.landscape),
            "sampler": [each.__name__ for each in SAMPLERS].index(sampler),
            "bend": [bends.index(self.arm.bend if each else BASELINE.bend) for each in own],
        }
        real = {
            "coverage": place.coverage,
            "temperature": place.temperature,
            "assumed": place.temperature or ASSUMED,
            "moving": place.moving,
            "many": self.arm.many,
            "strength": [self.strength if each else 1.0 for each in own],
        }
        return contest.Entry(
            **{name: jnp.asarray(value, jnp.int32) for name, value in whole.items()},
            **{name: jnp.asarray(value, jnp.float32) for name, value in real.items()},
        )


class Found(NamedTuple):
    """The comparisons, with Holm's p over each effect, and the slopes of the base condition."""

    compared: list[Record]
    slopes: list[Record]


def compare(
    seeds: int,
    seed: int = 0,
    *,
    shape: WorldShape = SHAPE,
    length: Length = LENGTH,
    arms: Sequence[Arm] = ARMS,
    places: Sequence[Place] = PLACES,
) -> Iterator[str | Found]:
    """Yields the name of each step when it is done, and at last what was found.

    Strengths are chosen on half as many worlds, none of which is reported.
    """
    reported, tuning = range(seeds), range(seeds, seeds + max(seeds // 2, 2))
    runs = _Runs(shape, length, seed, _block(len(tuning), len(reported)))
    runs.compile(dict.fromkeys(place.dimension for place in places))
    yield "programs compiled"

    tuned = [arm for arm in arms if len(arm.strengths) > 1]
    tried = [Task(a, place, s) for a in tuned for place in places for s in a.strengths]
    bases = [Task(BASELINE, place) for place in places]
    means = {t: x.sum(-1).mean() for t, x in runs(tried + bases, tuning).items()}
    yield "strengths chosen"

    best = {(a, p): _least(a, [p], means) for a in tuned for p in places}
    one = {a: _least(a, places, means) for a in tuned}
    effects: dict[str, list[Task]] = {
        "best": [Task(a, p, best.get((a, p), 1.0)) for a in arms for p in places],
        "one": [Task(a, p, one[a]) for a in tuned for p in places],
    }
    regret = runs(dict.fromkeys([*bases, *effects["best"], *effects["one"]]), reported)
    yield "methods compared"

    apart = [t for t in effects["best"] if t.arm.bends and t.place.condition in SEPARATED]
    effects["data"] = [t._replace(judged=False) for t in apart]
    effects["fit"] = [t._replace(asker=False) for t in apart]
    regret |= runs(effects["data"] + effects["fit"], reported)
    yield "data and fit told apart"

    compared = []
    for effect in EFFECTS:
        pairs = [(t, regret[t], regret[Task(BASELINE, t.place)]) for t in effects[effect]]
        compared += stats.correct([_record(effect, *pair) for pair in pairs])
    shown = [t for t in (*bases, *effects["best"]) if t.place.condition == "base"]
    yield Found(
        compared,
        [
            {"arm": t.arm.name, "landscape": t.place.landscape} | stats.loglog_slope(regret[t])
            for t in shown
        ],
    )


def _block(*seeds: int) -> int:
    """How many worlds a call runs, at most `BLOCK`: the fewest that need no further call."""
    return min(range(1, BLOCK + 1), key=lambda n: (sum(math.ceil(s / n) for s in seeds), n))


def _least(arm: Arm, places: Sequence[Place], means: dict[Task, float]) -> float:
    """The strength with the least regret: the mean over places of its ratio to the baseline's."""

    def ratio(strength: float) -> float:
        return float(
            np.mean([means[Task(arm, p, strength)] / means[Task(BASELINE, p)] for p in places])
        )

    return min(arm.strengths, key=ratio)


def _record(effect: str, task: Task, regret: np.ndarray, base: np.ndarray) -> Record:
    last = regret[:, -1].mean(dtype=np.float64) / base[:, -1].mean(dtype=np.float64) - 1
    return {
        "effect": effect,
        "arm": task.arm.name,
        "landscape": task.place.landscape,
        "condition": task.place.condition,
        "strength": task.strength,
        **stats.compare(regret.sum(-1, dtype=np.float64), base.sum(-1, dtype=np.float64)),
        "last": float(last),
    }


class _Runs:
    """Runs tasks with the worlds of one seed, some worlds at a time, in a few threads."""

    def __init__(self, shape: WorldShape, length: Length, seed: int, block: int):
        self._shape, self._length, self._block = shape, length, block
        self._key = jax.random.key(seed)

    def compile(self, dimensions: Iterable[int | None]) -> None:
        """Compiles the program of each dimension, before threads could compile one twice."""
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            first = [Task(BASELINE, Place("random", dimension=each)) for each in dimensions]
            list(pool.map(lambda task: self._run(task, 0), first))

    def __call__(self, tasks: Iterable[Task], which: range) -> dict[Task, np.ndarray]:
        """The regret [seeds, rounds] of each task. The last block's further worlds are left out."""
        tasks, starts = list(tasks), which[:: self._block]
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            found = pool.map(lambda job: self._run(*job), [(t, s) for t in tasks for s in starts])
            parts = np.array(list(found))
        whole = parts.reshape(len(tasks), -1, self._length.rounds)
        return dict(zip(tasks, whole[:, : len(which)], strict=True))

    def _run(self, task: Task, start: int) -> np.ndarray:
        shape = dataclasses.replace(self._shape, dimension=task.place.dimension)
        which = jnp.arange(start, start + self._block)
        run = contest.program(shape, self._length)
        return np.asarray(run(self._key, which, task.entry()).regret)
