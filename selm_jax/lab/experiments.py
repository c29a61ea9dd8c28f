"""Defines the experiments of `selm lab`, which make many runs with `many.run_many`."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from selm_jax.lab import exact, stats, theory
from selm_jax.lab.algorithms import (
    POLICY,
    REFERENCE,
    UNIFORM,
    Algorithm,
    Length,
    Settings,
    Slot,
    replace,
    zoo,
)
from selm_jax.lab.many import Cell, keys, run_many
from selm_jax.lab.stats import Record
from selm_jax.lab.worlds import REWARDED, WorldShape, make_world
from selm_jax.objectives.losses import Objective, dpo, optimism

# --- regret curves -------------------------------------------------------------------------------

REGRET_SHAPE = WorldShape(prompts=8, responses=16, dimension=8)
REGRET_LENGTH = Length(rounds=128, queries=1)
REGRET_ALPHA = 0.1  # in the convention alpha * beta
BASES = {f"selm_{x}": f"dpo_{x}" for x in ("moving", "practice", "code")}  # others: dpo_online


def regret_curves(
    seeds: int,
    seed: int = 0,
    *,
    shape: WorldShape = REGRET_SHAPE,
    length: Length = REGRET_LENGTH,
) -> list[Record]:
    """Computes each algorithm's cumulative regret, and its slope, in each landscape.

    The weight of optimism is the same in all of them, whatever their convention, except that
    `selm_theory` has the theorem's weight. In `uniform`, the uniform policy gives the candidates
    but is not the one evaluated. The curve contains some rounds, evenly spaced in log t; the slope
    uses all of the last three quarters. For each seed, an algorithm with the term is compared with
    itself without the term, and others with DPO on the same two slots (`of` says with which); all
    comparisons are one family of tests.
    """
    beta, temperature = shape.beta, Settings().temperature
    algorithms = zoo(beta, REGRET_ALPHA * beta)
    algorithms["selm_theory"] = replace(
        algorithms["selm_fixed"], name="selm_theory", schedule="theory"
    )
    shown = np.unique(np.geomspace(1, length.rounds, 33).round().astype(int))
    records, totals = [], {}
    for name, algorithm in algorithms.items():
        alpha = REGRET_ALPHA * (beta / temperature if algorithm.convention == "alpha" else 1)
        rate = 0.05 if algorithm.optimizer == "adam" else Settings().rate
        cells = [{"landscape": l, "coverage": 0.02, "alpha": alpha, "rate": rate} for l in REWARDED]
        trace = run_many(shape, algorithm, length, cells, seeds=seeds, seed=seed)
        for landscape, regret in zip(REWARDED, trace.regret, strict=True):
            slope = stats.loglog_slope(regret)
            so_far = np.cumsum(regret, axis=1, dtype=np.float64)
            curve = stats.curve(so_far[:, shown - 1].T)
            totals[name, landscape] = so_far[:, -1]
            records.append(
                {"algorithm": name, "landscape": landscape, "rounds": shown.tolist()}
                | curve
                | slope
            )
    others = [r for r in records if r["algorithm"] != "dpo_online"]
    against = []
    for name, landscape in ((r["algorithm"], r["landscape"]) for r in others):
        base = BASES.get(name, "dpo_online")
        against.append(
            {"of": base} | stats.compare(totals[name, landscape], totals[base, landscape])
        )
    for record, comparison in zip(others, stats.correct(against), strict=True):
        record["against"] = comparison
    return records


# --- the map -------------------------------------------------------------------------------------

MAP_SHAPE = WorldShape(prompts=16, responses=16)
MAP_LENGTH = Length(rounds=32, queries=2)
MAP_ALPHAS = (-0.3, -0.1, 0.01, 0.03, 0.1, 0.3, 1.0)
MAP_TEMPERATURES = (0.0, 0.1, 0.3, 1.0)
MAP_COVERAGES = (0.002, 0.01, 0.05, 0.2)
MAP_DIMENSIONS = (4, 16, 64, None)


def optimism_map(
    seeds: int,
    seed: int = 0,
    *,
    landscape: str = "two_peaks",
    shape: WorldShape = MAP_SHAPE,
    length: Length = MAP_LENGTH,
    alphas: Sequence[float] = MAP_ALPHAS,
    temperatures: Sequence[float] = MAP_TEMPERATURES,
    coverages: Sequence[float] = MAP_COVERAGES,
    dimensions: Sequence[int | None] = MAP_DIMENSIONS,
) -> Iterator[list[Record]]:
    """Compares SELM's cumulative regret (Algorithm 2, fixed reference) with that of DPO.

    Yields the records of one dimension at a time. `against` is "online", the same algorithm at
    alpha 0, or "passive", DPO on pairs of the reference; queries and seeds are the same. A negative
    alpha is the opposite of optimism. The theory does not consider it, but a map restricted to the
    theory's range could not show whether it helps.
    """
    algorithms = zoo(shape.beta)
    selm = replace(algorithms["selm_fixed"], convention="alpha_beta")
    for dimension in dimensions:
        here = WorldShape(shape.prompts, shape.responses, dimension, shape.beta)
        places = [
            {"landscape": landscape, "coverage": c, "temperature": t}
            for c, t in itertools.product(coverages, temperatures)
        ]
        cells = [place | {"alpha": a} for place in places for a in (0.0, *alphas)]
        regret = run_many(here, selm, length, cells, seeds=seeds, seed=seed).regret.sum(-1)
        regret = regret.reshape(len(places), 1 + len(alphas), seeds)
        passive = run_many(here, algorithms["dpo_passive"], length, places, seeds=seeds, seed=seed)
        records = []
        for i, place in enumerate(places):
            named = {"dimension": dimension or here.prompts * here.responses} | place
            for against, base in (("online", regret[i, 0]), ("passive", passive.regret[i].sum(-1))):
                for a, total in zip(alphas, regret[i, 1:], strict=True):
                    records.append(
                        named | {"alpha": a, "against": against} | stats.compare(total, base)
                    )
        yield records


# --- one condition at a time ---------------------------------------------------------------------

ALPHAS = (-0.1, 0.01, 0.03, 0.1, 0.3, 1.0)
Condition = tuple[str, WorldShape, Algorithm, Length, Cell]


def conditions() -> list[Condition]:
    """Lists the conditions of experiments: a base case, and variants with one change each."""
    shape = WorldShape(prompts=16, responses=16, dimension=16)
    length = Length(rounds=32, queries=2)
    base = replace(zoo(shape.beta)["selm_fixed"], name="base", convention="alpha_beta")

    def case(name, *, world=None, cell=None, size=None, **changes) -> Condition:
        return (
            name,
            dataclasses.replace(shape, **(world or {})),
            replace(base, **changes) if changes else base,
            length._replace(**(size or {})),
            cell or {},
        )

    return [
        case("base"),
        case("1 prompt", world={"prompts": 1}),
        case("4 prompts", world={"prompts": 4}),
        case("64 prompts", world={"prompts": 64}),
        case("1 query a round", size={"queries": 1}),
        case("8 queries a round", size={"queries": 8}),
        case("infinite data", exact_data=True),
        case("4 features", world={"dimension": 4}),
        case("tabular", world={"dimension": None}),
        case("needle", cell={"landscape": "needle"}),
        case("smooth", cell={"landscape": "smooth"}),
        case("random", cell={"landscape": "random"}),
        case("thin coverage 0.002", cell={"coverage": 0.002}),
        case("thick coverage 0.2", cell={"coverage": 0.2}),
        case("no noise", cell={"temperature": 0.0}),
        case("much noise", cell={"temperature": 1.0}),
        case("20 % flipped", cell={"flips": 0.2}),
        case("believes in less noise", cell={"assumed": 0.03}),
        case("believes in more noise", cell={"assumed": 0.3}),
        case("moving reference", moving=True),
        case("only new data", kept=False),
        case("moving, only new data", moving=True, kept=False),
        case("y_ref sampled", explore=1),
        case("policy against policy", slots=(POLICY, POLICY)),
        case("best of 4", slots=(POLICY,) * 4),
        case("policy at temperature 2", slots=(Slot("policy", 2.0), REFERENCE)),
        case("greedy policy", slots=(Slot("policy", 0.0), REFERENCE)),
        case("both from the reference", slots=(REFERENCE, REFERENCE)),
        case("both uniform", slots=(UNIFORM, UNIFORM)),
        case("alpha / sqrt(round)", schedule="inverse_sqrt"),
        case("tight class", cell={"bound": 1.0}),
        case("wide class", cell={"bound": 8.0}),
        case("64 descent steps", size={"steps": 64}),
        case("8 queries, 64 steps", size={"queries": 8, "steps": 64}),
        case("adam", optimizer="adam", cell={"rate": 0.1}),
        case("beta 0.3", world={"beta": 0.3}, fit=dpo(0.3), bonus=optimism(1.0, 0.3)),
    ]


def one_at_a_time(
    seeds: int, seed: int = 0, cases: Sequence[Condition] | None = None
) -> Iterator[list[Record]]:
    """Compares each condition at each alpha of `ALPHAS` with itself at alpha 0.

    Yields the records of one condition at a time.
    """
    cases = conditions() if cases is None else cases
    programs: dict[Any, list[Cell]] = {}  # the cells that share one compilation
    for _, shape, algorithm, length, cell in cases:
        programs.setdefault((shape, algorithm, length), []).append(cell)
    done: dict[Any, Iterator[np.ndarray]] = {}
    for name, *program, _ in cases:
        here = tuple(program)
        if here not in done:
            cells = [cell | {"alpha": a} for cell in programs[here] for a in (0.0, *ALPHAS)]
            regret = run_many(*here, cells, seeds=seeds, seed=seed).regret.sum(-1)
            done[here] = iter(regret.reshape(-1, 1 + len(ALPHAS), seeds))
        regret = next(done[here])
        yield [
            {"condition": name, "alpha": a} | stats.compare(total, regret[0])
            for a, total in zip(ALPHAS, regret[1:], strict=True)
        ]


# --- why -----------------------------------------------------------------------------------------

WHY = ("base", "64 prompts", "4 features", "needle", "thin coverage 0.002", "tabular")
WHY_ALPHAS = (0.03, 0.1, 0.3)
VARIANTS = {
    "bound": "DPO (no term) with class size",
    "both": "SELM with alpha",
    "asker": "the bonus only in sampling, with alpha",
    "judged": "the bonus only in the fit, with alpha",
}


def why(seeds: int, seed: int = 0) -> Iterator[list[Record]]:
    """Separates the bonus's effect on the collected data from its effect on the fit.

    This is done for the conditions in `WHY`.

    Yields the records of one condition at a time. `variant` "both" is SELM. In "asker" only the
    policy that samples is fitted with the term, and a plain DPO fit to its data is evaluated: the
    effect of the data alone. In "judged" the data is that of plain DPO, and the evaluated fit has
    the term: the effect of the fit alone. "bound" has no term (alpha is 0) and another size of the
    policy class: the effect of plain regularisation.
    """
    for name, shape, base, length, cell in conditions():
        if name not in WHY:
            continue
        shares = {"both": (1, 1), "asker": (1, 0), "judged": (0, 1)}
        asked = [("bound", b, {"bound": b}) for b in (0.5, 1.0, 4.0)]
        asked += [
            (variant, a, {"alpha": a, "asker": asker, "judged": judged})
            for variant, (asker, judged) in shares.items()
            for a in WHY_ALPHAS
        ]
        cells = [cell | changed for *_, changed in [("", 0, {}), *asked]]
        split = replace(base, split=True)
        regret = run_many(shape, split, length, cells, seeds=seeds, seed=seed).regret.sum(-1)
        yield [
            {"condition": name, "variant": variant, "setting": value}
            | stats.compare(total, regret[0])
            for (variant, value, _), total in zip(asked, regret[1:], strict=True)
        ]


# --- an idea -------------------------------------------------------------------------------------


IDEA_SHAPE = WorldShape(prompts=16, responses=16, dimension=16)
IDEA_LENGTH = Length(rounds=32, queries=2)


def idea(
    objectives: dict[str, Objective],
    seeds: int,
    seed: int = 0,
    *,
    beta: float,
    shape: WorldShape = IDEA_SHAPE,
    length: Length = IDEA_LENGTH,
) -> Iterator[list[Record]]:
    """Compares the given objectives with DPO on the same worlds, queries and seeds.

    Yields the records of one objective at a time. A pair is a sample of the policy and one of the
    reference, which is also y_ref; the reference is fixed.
    """
    shape = dataclasses.replace(shape, beta=beta)
    cells = [{"landscape": name} for name in REWARDED]
    base = None
    for name, objective in {"dpo": dpo(beta), **objectives}.items():
        algorithm = Algorithm(name, fit=objective, explore=1)
        regret = run_many(shape, algorithm, length, cells, seeds=seeds, seed=seed).regret.sum(-1)
        base = regret if base is None else base
        yield [
            {"objective": name, "landscape": landscape} | stats.compare(total, zero)
            for landscape, total, zero in zip(REWARDED, regret, base, strict=True)
        ]


# --- theory --------------------------------------------------------------------------------------

THEORY_SHAPE = WorldShape(prompts=16, responses=16, dimension=16)


def theorem(
    seeds: int,
    seed: int = 0,
    *,
    shape: WorldShape = THEORY_SHAPE,
    betas: Sequence[float] = (0.1, 0.3, 1.0),
    horizons: Sequence[int] = (32, 128),
) -> Iterator[list[Record]]:
    """Computes Theorem 5.3's constants in random worlds, and SELM's regret with its alpha.

    There is one pair per round, as in Algorithm 2. Constants are medians over the seeds. The
    theorem's rewards are those on which the feedback depends, r / temperature, so `bound` (without
    its constant) and `worst`, the regret of never leaving the reference, are in that unit. The
    compared regrets, with the theorem's alpha and of DPO, are in units of r as everywhere else.
    """
    temperature = Settings().temperature
    for beta, rounds in itertools.product(betas, horizons):
        here = dataclasses.replace(shape, beta=beta)
        found, still = _theorem(here, rounds)(jax.random.key(seed), jnp.arange(seeds))
        middle = {name: float(np.median(x)) for name, x in found._asdict().items()}
        optimistic = replace(zoo(beta)["selm_fixed"], schedule="theory")
        total, base = (
            run_many(here, a, Length(rounds, 1), [{}], seeds=seeds, seed=seed).regret[0].sum(-1)
            for a in (optimistic, zoo(beta)["dpo_online"])
        )
        worst = float(np.median(still)) * rounds / temperature
        yield [
            {"beta": beta, "rounds": rounds}
            | middle
            | {"worst": worst}
            | stats.compare(total, base)
        ]


@functools.cache
def _theorem(shape: WorldShape, rounds: int):
    def one(key, which):
        world = make_world(keys(key, which)[0], shape)
        return theory.of_world(world, rounds), exact.regret(world, world.log_reference)

    return jax.jit(jax.vmap(one, in_axes=(None, 0)))
