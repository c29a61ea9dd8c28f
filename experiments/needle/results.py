"""Measures the finished runs of the needle in SmolLM2 exactly, and writes the document's tables.

    PYTHONPATH=. python -m experiments.needle.results

reads the runs' models and the openings, and writes docs/images/needle.json (a record for each run)
and the tables of docs/middle_world.md. A run that has its record is not measured again. A record
has two digests that its run wrote: `openings`, of the first iteration's prompts with their
openings, and `experiment`, of config.yaml (null where it was not kept). Records and runs of other
openings than the present ones are refused. With `--drawn` it reads no runs: the tables are made
again from the records.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.middle.results import between, percent, said, verdict
from experiments.needle import make, oracle
from selm_jax.config import Experiment
from selm_jax.evaluation.model import open_model
from selm_jax.lab import stats
from selm_jax.policy.policy import Policy
from selm_jax.run.data import Data
from selm_jax.run.task import task_of
from selm_jax.shell import artifacts
from selm_jax.sweep.grid import Member, read_sweep
from selm_jax.tables import ranked
from selm_jax.text.prompts import prompts_digest

HERE = Path(__file__).parent
DOCUMENT = HERE.parents[1] / "docs" / "middle_world.md"
RECORDS = DOCUMENT.parent / "images" / "needle.json"
BASELINE = "dpo"
METHODS = (BASELINE, "geb", "best_of_4")
PREDICTED = {"geb": "less", "best_of_4": "less"}  # of the laboratory, in its landscape needle
Record = dict[str, Any]


class Measure:
    """The held-out prompts with their openings, and what the start model does with them."""

    def __init__(self, folder: Path = oracle.FOLDER):
        rows, train = (_rows(folder / f"{name}.jsonl") for name in ("heldout", "train"))
        facts = json.loads((folder / "openings.json").read_text(encoding="utf-8"))
        start = open_model(facts["model"]["source"])
        vocabulary = start.tokenizer.backend.get_vocab()
        openings = {r["prompt_id"]: [vocabulary[w] for w in r["openings"]] for r in rows + train}
        self.openings_of = openings
        self.asked = [make.messages(row) for row in rows]
        self.openings = [openings[row["prompt_id"]] for row in rows]
        self.start = oracle.first_tokens(start, self.asked)
        self.best = oracle.best_value(oracle.hits(self.start, self.openings))

    def of_model(self, model: Policy | None) -> dict[str, float]:
        """The exact regret, reward and KL of a model's first tokens; None means the start model."""
        likely = self.start if model is None else oracle.first_tokens(model, self.asked)
        regret = self.best - oracle.value(likely, self.start, self.openings)
        return {
            "regret": float(regret.mean()),
            "reward": float(oracle.hits(likely, self.openings).mean()),
            "kl_first": float(oracle.divergence(likely, self.start).mean()),
        }

    def of_run(self, member: Member) -> Record:
        """A run's record: lists with a number for the start model and each iteration.

        `told` is the share of an iteration's pairs whose answers have different rewards, and
        `misread` that of its answers whose text has another first token than the one that was
        drawn, so that they got another reward than `reward` counts; None for the start model.
        """
        numbers: dict[str, list[float | None]] = {"told": [None], "misread": [None]}
        for name, number in self.of_model(None).items():
            numbers[name] = [_short(number)]
        for t in range(1, member.experiment.iterations + 1):
            folder = member.folder / f"iteration_{t}"
            model = open_model(str(folder / "model"), dtype="float32")
            found = self.of_model(model) | self.of_answers(folder)
            for name, number in found.items():
                numbers[name].append(_short(number))
        named = {"method": member.cell.name, "seed": member.seed}
        return named | digests_of(member.folder) | numbers

    def of_answers(self, folder: Path) -> dict[str, float]:
        """Reads `told` and `misread` of `of_run` from an iteration's answers."""
        rows = ranked.read(folder / "ranked.parquet")
        hit = [bool(r.token_ids) and r.token_ids[0] in self.openings_of[r.prompt_id] for r in rows]
        roles = {(r.prompt_id, role): r.score for r in rows for role in ("chosen", "rejected") if
                 getattr(r, role)}  # fmt: skip
        pairs = {prompt for prompt, _ in roles}
        return {
            "told": float(np.mean([roles[p, "chosen"] != roles[p, "rejected"] for p in pairs])),
            "misread": float(np.mean([r.score != h for r, h in zip(rows, hit, strict=True)])),
        }


def _short(number: float) -> float:
    return float(f"{number:.6g}")


def _rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _is_done(member: Member) -> bool:
    last = member.folder / f"iteration_{member.experiment.iterations}"
    return last.exists() and artifacts.Stages(last).read().get("export", {}).get("done", False)


def openings_now(experiment: Experiment) -> str:
    """The digest that a run of this experiment would give its prompts and openings now."""
    return prompts_digest(Data(experiment, task_of(experiment.objective), None).prompts(1))


def digests_of(run: Path) -> dict[str, str]:
    """The digests of its openings and of its experiment that a run wrote, as a record has them."""
    generated = artifacts.Stages(run / "iteration_1").read()["generate"]
    experiment = artifacts.read_sealed(run / "manifest.json")["config_sha256"]
    return {"openings": generated["inputs"]["prompts"], "experiment": experiment}


def read_runs(members: Sequence[Member], known: Sequence[Record] = ()) -> list[Record]:
    """A record of each finished run; those in `known` are not measured again.

    A run is measured again if its record has other digests than the run.

    Raises:
      ValueError: a run, or a record whose run is not here, belongs to other openings than those
        that the experiments read now. Its regret is not comparable with that of the others.
    """
    records = {(r["method"], r["seed"]): r for r in known}
    now = {m.seed: openings_now(m.experiment) for m in members}
    done = {(m.cell.name, m.seed): m for m in members if _is_done(m)}
    digests = {key: digests_of(m.folder) for key, m in done.items()}
    for key, found in (records | digests).items():
        if found.get("openings") != now.get(key[1]):
            what, where = ("run", done[key].folder) if key in done else ("record", RECORDS)
            raise ValueError(
                f"The {what} of {key[0]}, seed {key[1]}, in {where}, belongs to other openings "
                f"than those of {oracle.FOLDER}. Make its openings there again (PYTHONPATH=. "
                "python -m experiments.needle.make), or remove it and run its experiment again"
            )
    new = [m for key, m in done.items() if not digests[key].items() <= records.get(key, {}).items()]
    if new:
        measure = Measure()
        records |= {(m.cell.name, m.seed): measure.of_run(m) for m in new}
    return sorted(records.values(), key=lambda r: (r["seed"], METHODS.index(r["method"])))


def paired(records: Sequence[Record]) -> list[Record]:
    """The records of the seeds for which all methods are finished."""
    seeds = {method: {r["seed"] for r in records if r["method"] == method} for method in METHODS}
    whole = set.intersection(*seeds.values())
    return [r for r in records if r["seed"] in whole]


def totals(records: Sequence[Record], method: str) -> np.ndarray:
    """The cumulative regret of each of a method's runs, over all iterations, by seed."""
    mine = sorted((r for r in records if r["method"] == method), key=lambda r: r["seed"])
    return np.array([sum(r["regret"][1:]) for r in mine])


def compare(records: Sequence[Record]) -> list[Record]:
    """The methods' paired differences from DPO, corrected over both (Holm)."""
    base = totals(records, BASELINE)
    return stats.correct(
        [{"method": each} | stats.compare(totals(records, each), base) for each in METHODS[1:]]
    )


def found(records: Sequence[Record]) -> Iterator[str]:
    """The lines of the table that puts what was found beside what was predicted."""
    seeds = len(totals(records, BASELINE))
    if seeds < 2:
        yield f"Nothing is compared yet, because all methods have run with {seeds} seed only."
        return
    yield "| method | seeds | predicted | found | difference [95 %] | p (Holm) | |"
    yield "| --- | --- | --- | --- | --- | --- | --- |"
    for r in compare(records):
        expected, seen = PREDICTED[r["method"]], said(r)
        about = (f"`{r['method']}`", str(seeds), expected, seen, percent(r), f"{r['p_holm']:.2g}")
        yield f"| {' | '.join(about)} | {verdict(expected, seen)} |"


def levels(records: Sequence[Record]) -> Iterator[str]:
    """The lines of the table of all finished runs, and of the methods' means over seeds.

    Rewards are those of the start model and of each iteration, the KL that of the last one, and the
    pairs that tell something are counted in all iterations.
    """
    yield "| run | cumulative regret | reward | KL, first token | pairs that tell |"
    yield "| --- | --- | --- | --- | --- |"
    for r in records:
        total, told = sum(r["regret"][1:]), np.mean(r["told"][1:])
        rewards = ", ".join(f"{x:.3f}" for x in r["reward"])
        cells = (f"{total:.3f}", rewards, f"{r['kl_first'][-1]:.2f}", f"{100 * told:.0f} %")
        yield f"| `{r['method']}`, seed {r['seed']} | {' | '.join(cells)} |"
    for method in METHODS:
        mine = totals(records, method)
        if len(mine) > 1:
            e = stats.over_seeds(mine)
            shown = f"{e.mean:.3f} [{e.low:.3f}, {e.high:.3f}]"
            yield f"| `{method}`, mean of {len(mine)} seeds | {shown} | | | |"


def main(drawn: bool = False) -> None:
    """Writes the records, and the tables of the document."""
    members = read_sweep(HERE / "sweep.yaml").members
    records = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.exists() else []
    if not drawn:
        records = read_runs(members, records)
        lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in records)
        artifacts.write_text(RECORDS, f"[\n{lines}\n]\n")
    whole, planned = paired(records), len(members)
    page = DOCUMENT.read_text(encoding="utf-8")
    told = f"{len(records)} of the {planned} planned runs are finished."
    page = between(page, "smollm2: runs", [told])
    page = between(page, "smollm2: found", list(found(whole)))
    page = between(page, "smollm2: levels", list(levels(records)))
    artifacts.write_text(DOCUMENT, page)
    print("\n".join([told, *found(whole), *levels(records)]))


if __name__ == "__main__":
    main("--drawn" in sys.argv[1:])
