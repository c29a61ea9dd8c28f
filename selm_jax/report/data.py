"""Reads a run folder into dataclasses: everything that a report shows, and what is missing.

This module only reads and checks. A run may be unfinished; `RunData.unfinished` lists what its
stages have not written yet. If a file that a finished stage wrote is missing or unreadable, that is
an error.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selm_jax.preferences.selection import PLACES
from selm_jax.report.reading import (
    ReportError,
    check_digest,
    json_file,
    mapping,
    not_as_written,
    number,
    sealed_mapping,
    settings,
    wrong,
)
from selm_jax.shell import jsonl
from selm_jax.shell.artifacts import ArtifactError, iterations
from selm_jax.shell.sealed import sha256
from selm_jax.tables import heldout

STAGES = ("generate", "rank", "score", "train", "export", "evaluate")
"""The stages of an iteration in the order in which they run. Iteration 0 has only the last one."""

KINDS = ("greedy", "sample")
_SETS = "data.heldout_sets"


@dataclass(frozen=True)
class Answer(heldout.Row):
    """One held-out answer, without its token ids, and the iteration whose policy generated it.

    If its `score` is NaN because a judge's reply was unreadable, its evaluation has the metric
    `unread`.
    """

    iteration: int


@dataclass(frozen=True)
class Stage:
    """The record of one finished stage of an iteration, such as `train`.

    `seconds` is None if it recorded no time. `outputs` maps each file that it wrote to its digest.
    `logged` is the digest of its lines in metrics.jsonl, or None.
    """

    name: str
    counts: Mapping[str, float]
    seconds: float | None
    outputs: Mapping[str, str] = field(default_factory=dict)
    logged: str | None = None

    @property
    def drops(self) -> dict[str, float]:
        """The number of dropped prompts for each reason."""
        return {
            key.removeprefix("drops/"): n
            for key, n in self.counts.items()
            if key.startswith("drops/")
        }

    @property
    def explored(self) -> dict[str, float]:
        """The number of pairs by the explored answer's rank: best, middle, worst or tied."""
        return {place: self.counts.get(f"explore/{place}", 0) for place in PLACES}


@dataclass(frozen=True)
class Update:
    """One optimizer update. `index` counts updates through the whole run, from 1."""

    iteration: int
    step: int
    index: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class RunData:
    """The data of one run, read from its folder; iteration 0 is the start model.

    `planned` is the number of iterations in the settings, or None if they do not give one.
    `evaluates` is False if the settings name no held-out prompts.
    """

    path: Path
    name: str
    manifest: Mapping[str, Any]
    config_text: str
    settings: Mapping[str, str]
    planned: int | None
    evaluates: bool
    evaluations: Mapping[int, Mapping[str, float]]
    updates: tuple[Update, ...]
    stages: Mapping[int, Mapping[str, Stage]]
    answers: tuple[Answer, ...]
    unfinished: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def iterations(self) -> tuple[int, ...]:
        """All iterations that have written any data, in order."""
        found = set(self.evaluations) | set(self.stages) | {u.iteration for u in self.updates}
        return tuple(sorted(found | {a.iteration for a in self.answers}))

    @property
    def method(self) -> str:
        return str(self.manifest.get("method", "unnamed method"))

    @property
    def heldout_sets(self) -> tuple[str, ...]:
        """The names of the held-out sets besides `data.heldout`, in the order of the settings."""
        found = (key.split(".")[2] for key in self.settings if key.startswith(_SETS + "."))
        return tuple(dict.fromkeys(found))

    def of_set(self, name: str, measure: str) -> str:
        """What `metric` calls a measure of a held-out set; a reward model has its own accuracy."""
        of_pairs = f"{name}/pairs/{measure}"
        there = any(f"heldout/{of_pairs}" in found for found in self.evaluations.values())
        return of_pairs if there else f"{name}/{measure}"

    def metric(self, iteration: int, name: str) -> float | None:
        """The metric `heldout/NAME` of an evaluation, also that of a set as `SET/NAME`.

        It is None if the metric is missing or not finite.
        """
        value = self.evaluations.get(iteration, {}).get(f"heldout/{name}")
        return value if value is not None and math.isfinite(value) else None


def report_data(run: Path) -> RunData:
    """Reads one run folder, finished or not.

    Raises:
      FileNotFoundError: the folder, `config.yaml` or `manifest.json` is missing, or a held-out
        table is missing although `stage.json` says that the stage that writes it is done.
      ReportError: a file has unexpected content; the message names the file, line and key.
    """
    run = Path(run)
    manifest, config_text, config = written_settings(run)
    notes: list[str] = []
    folders = iterations(run)
    stages = {k: _stages(folder) for k, folder in folders.items()}
    # A reward model generates no answers: it is evaluated on pairs, so it has no table of answers.
    pairs = {k for k, folder in folders.items() if (folder / "pairs.parquet").is_file()}
    tables = {
        k: _answers(k, folder, None if k in pairs else stages[k].get("evaluate"))
        for k, folder in folders.items()
    }
    evaluates = _evaluates(config)
    _check_log(run / "metrics.jsonl", stages)
    evaluations, updates = _metrics(run / "metrics.jsonl", notes)
    planned = _planned(config)
    return RunData(
        path=run,
        name=str(manifest.get("name") or run.resolve().name),
        manifest=manifest,
        config_text=config_text,
        settings=dict(flatten(config)),
        planned=planned,
        evaluates=evaluates,
        evaluations=evaluations,
        updates=updates,
        stages=stages,
        answers=tuple(answer for k in sorted(tables) for answer in tables[k]),
        unfinished=tuple(_unfinished(planned, evaluates, stages, evaluations, tables, pairs)),
        notes=tuple(notes),
    )


def written_settings(run: Path) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """Reads the manifest of a run folder, and its settings as text and as a tree.

    Raises:
      FileNotFoundError, ReportError: see `report_data`.
    """
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is not a folder; expected a run folder such as runs/NAME")
    missing = [name for name in ("config.yaml", "manifest.json") if not (run / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{run} is not a run folder: it lacks {' and '.join(missing)}. "
            "`selm run` writes both before its first stage; check the path."
        )
    manifest = sealed_mapping(json_file(run / "manifest.json"), run / "manifest.json")
    if manifest.pop("config_sha256", None) not in (None, sha256(run / "config.yaml")):
        raise not_as_written(run / "config.yaml")
    return manifest, *settings(run / "config.yaml")


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields nested settings as (dotted key, text); a list of plain values stays one value."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(value, list) and any(isinstance(inner, (dict, list)) for inner in value):
        for index, inner in enumerate(value):
            yield from flatten(inner, f"{prefix}[{index}]")
    else:
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        yield prefix, text


def _unfinished(
    planned: int | None,
    evaluates: bool,
    stages: Mapping[int, Mapping[str, Stage]],
    evaluations: Mapping[int, Any],
    tables: Mapping[int, Sequence[Answer]],
    pairs: Container[int],
) -> Iterator[str]:
    last = max([planned or 0, *stages, *evaluations])
    for k in range(last + 1):
        expected = [s for s in STAGES if (k or s == "evaluate") and (evaluates or s != "evaluate")]
        done = stages.get(k, {})
        open_stages = [name for name in expected if name not in done]
        label = f"Iteration {k}" if k else "Iteration 0 (the start model)"
        if not done and open_stages:
            yield f"{label}: not begun, or none of its stages is finished yet."
        elif open_stages:
            yield f"{label}: {', '.join(open_stages)} not finished yet."
        elif evaluates and not evaluations.get(k):
            yield f"{label}: evaluated, but metrics.jsonl has no line of its evaluation."
        elif evaluates and not tables.get(k) and k not in pairs:
            yield f"{label}: its table of held-out answers is empty."


def _planned(config: Mapping[str, Any]) -> int | None:
    """The number of iterations in the settings; `iterations` is a number or a list."""
    value = config.get("iterations")
    if isinstance(value, list):
        return len(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _evaluates(config: Mapping[str, Any]) -> bool:
    """Returns whether the settings ask for evaluation: False for `data.heldout: null`."""
    data = config.get("data")
    return not (isinstance(data, dict) and "heldout" in data and data["heldout"] is None)


def _stages(folder: Path) -> dict[str, Stage]:
    path = folder / "stage.json"
    if not path.is_file():
        return {}
    entries = mapping(json_file(path), path)
    order = {name: place for place, name in enumerate(STAGES)}
    stages = {}
    for name in sorted(entries, key=lambda n: (order.get(n, len(order)), n)):
        entry = sealed_mapping(entries[name], path, name)
        if not entry.get("done", True):
            continue  # the stage has begun, so its settings are recorded, but it is not finished
        counts = mapping(entry.get("counts", {}), path, f"{name}.counts")
        seconds = entry.get("seconds")
        stages[name] = Stage(
            name=name,
            counts={  # null: a judge's reply was unreadable
                key: number(n, path, f"{name}.counts.{key}")
                for key, n in counts.items()
                if n is not None
            },
            seconds=None if seconds is None else number(seconds, path, f"{name}.seconds"),
            outputs=mapping(entry.get("outputs", {}), path, f"{name}.outputs"),
            logged=entry.get("logged"),
        )
    return stages


def _answers(iteration: int, folder: Path, by: Stage | None) -> tuple[Answer, ...]:
    """Reads the table of held-out answers, which the finished stage `by` wrote."""
    path = folder / "heldout.parquet"
    if not path.is_file():
        if by is not None:
            raise FileNotFoundError(
                f"{path} is missing, but {folder / 'stage.json'} says `evaluate` is done. "
                "Copy the whole run folder, or run `selm measure` again."
            )
        return ()
    check_digest(path, None if by is None else by.outputs.get(path.name))
    try:
        rows = heldout.read(path, token_ids=False)
    except ArtifactError as error:
        raise ReportError(str(error)) from error
    for place, row in enumerate(rows):
        if row.kind not in KINDS:
            raise ReportError(f"{path}, row {place}: kind is {row.kind!r}, expected {KINDS}")
    return tuple(Answer(**vars(row), iteration=iteration) for row in rows)


def _metrics(
    path: Path, notes: list[str]
) -> tuple[dict[int, dict[str, float]], tuple[Update, ...]]:
    """Reads metrics.jsonl: evaluation metrics by iteration, and optimizer updates in order.

    If a line is repeated, the last one counts: a run that was killed and resumed logs some of its
    updates twice.
    """
    evaluations: dict[int, dict[str, float]] = {}
    steps: dict[tuple[int, int], dict[str, float]] = {}
    odd: dict[str, int] = {}
    for where, line in _metric_lines(path, notes):
        stage, iteration = line.get("stage"), line.get("iteration")
        if stage not in ("train", "evaluate"):
            continue  # other stages may log too, but the report has no plots for them
        numbers = {
            key: float(value)
            for key, value in line.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool)
        }
        if not isinstance(iteration, int):
            raise wrong(f"{where}, iteration", iteration, "a whole number")
        for key, value in numbers.items():
            if not math.isfinite(value):
                odd[key] = odd.get(key, 0) + 1
        if stage == "evaluate":
            evaluations[iteration] = numbers
        else:
            step = line.get("step")
            if not isinstance(step, int):
                raise wrong(f"{where}, step", step, "a whole number from 1")
            steps[iteration, step] = numbers
    notes.extend(
        f"{key} is not a finite number on {count} line{'s' * (count > 1)} of metrics.jsonl: "
        "the plots have gaps there."
        for key, count in odd.items()
    )
    longest: dict[int, int] = {}
    for k, step in steps:
        longest[k] = max(step, longest.get(k, 0))
    before = {k: sum(n for j, n in longest.items() if j < k) for k in longest}
    updates = tuple(
        Update(iteration=k, step=step, index=before[k] + step, metrics=steps[k, step])
        for k, step in sorted(steps)
    )
    return dict(sorted(evaluations.items())), updates


def _check_log(path: Path, stages: Mapping[int, Mapping[str, Stage]]) -> None:
    """Raises ReportError if a finished stage's lines of metrics.jsonl were changed later."""
    lines: dict[tuple[Any, Any], list[Any]] = {}
    for _, line in _metric_lines(path, []):
        lines.setdefault((line.get("iteration"), line.get("stage")), []).append(line)
    for k, of_iteration in stages.items():
        for name, stage in of_iteration.items():
            if stage.logged not in (None, jsonl.values_digest(lines.get((k, name), []))):
                raise ReportError(
                    f"{path}: the lines of stage {name!r}, iteration {k}, have changed since the "
                    "stage wrote them. Restore the file from a copy"
                )


def _metric_lines(path: Path, notes: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        notes.append("There is no metrics.jsonl yet: nothing has been trained or evaluated so far.")
        return
    for line in jsonl.lines(path.read_bytes()):
        where = f"{path}, line {line.number}"
        try:
            found = line.value()
        except jsonl.JsonError as error:
            if not line.ended:  # the run is writing it right now
                notes.append(f"The last line of metrics.jsonl (line {line.number}) is incomplete.")
                return
            raise ReportError(
                f"{where} is not JSON: {error}. Restore the file from a copy"
            ) from error
        yield where, mapping(found, path, f"line {line.number}")
