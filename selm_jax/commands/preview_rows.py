"""Collects the rows that `selm preview` shows, from the run folder or from the data."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from selm_jax.objectives.roles import ROLES
from selm_jax.preferences.examples import Example
from selm_jax.run.inputs import StoredTable, digests_of
from selm_jax.run.rows import prompt_ids
from selm_jax.run.run import Run
from selm_jax.shell import artifacts
from selm_jax.stages.generate import generate
from selm_jax.stages.rank import rank, teach
from selm_jax.stages.score import paired_examples, score
from selm_jax.stages.step import Step
from selm_jax.tables import examples, ranked
from selm_jax.text.answers import answers
from selm_jax.text.chat import UnusableAnswer
from selm_jax.text.layout import paper_row

CUT = ("prompts_cut", "responses_cut")
_STAGES = (generate.name, rank.name, score.name)  # that make the rows


class Alone(NamedTuple):
    """A prompt without answers, with the fields of `Example` that a preview uses."""

    prompt_id: str
    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...] = ()
    roles: Mapping[str, int] = {}

    def playing(self, role: str) -> tuple[int, ...]:  # noqa: ARG002 (as an Example's)
        return ()


@dataclasses.dataclass(frozen=True)
class Preview:
    """The training rows of an iteration, and counts of rows that were left out or cut.

    Attributes:
      source: where the rows come from, in words.
      rows: those that are trained on, or that could be.
      dropped: reason -> prompts.
      cut: what `text.layout: paper` cut -> rows.
      tied: prompts whose best and worst scores are equal; None before they are ranked.
      changed: settings that differ from those of the run's files, in words.
      stale: why the run's files stop `selm run`, in words; None if they do not.
    """

    source: str
    rows: Sequence[Example | Alone]
    dropped: Mapping[str, int]
    cut: Mapping[str, int]
    tied: int | None = None
    changed: Sequence[str] = ()
    stale: str | None = None


def collect(run: Run, t: int) -> Preview:
    """Collects the training rows of iteration t, from the run folder or from the data.

    Those of the run folder are used if they were made from the data as it is now.
    """
    folder = run.folder.iteration(t)
    if not (folder / "ranked.parquet").exists():
        return _from_data(run, t)
    record = artifacts.Stages(folder).read()
    if (stage := _made_from_other_data(run, t, record)) is not None:
        stale = (
            f"stage {stage!r} of iteration {t} was done with other prompts or another chat "
            f"template, and its rows are not shown. `selm redo {run.folder.path} {stage} -t {t}` "
            "does it again; another `output` keeps it"
        )
        return dataclasses.replace(_from_data(run, t), stale=stale)
    candidates = ranked.read(folder / "ranked.parquet", token_ids=False)
    best = {row.prompt_id: row.score for row in candidates if row.chosen}
    dropped = Counter({row.prompt_id: row.dropped for row in candidates if row.dropped}.values())
    # Pairs of the data have no scores: NaN, which equals nothing.
    tied = dropped["tie"] + sum(
        row.score == best[row.prompt_id] for row in candidates if row.rejected
    )
    if (file := folder / "examples.parquet").exists():
        rows, counts = examples.read(file), record.get("score", {}).get("counts", {})
        cut = {key: counts[key] for key in CUT if key in counts}
    else:
        file = folder / "ranked.parquet"
        step = Step.of(run, score.name, t, score.keys(run))
        rows, cut = paired_examples(step, run.prompts(t), StoredTable(folder, file.name), run.chat)
    changes = _changes(run, t, record)
    changed = [
        f"{key} was {before!r} and is now {now!r}"
        for key, (_, before, now) in sorted(changes.items())
    ]
    stale = None
    if changes:
        stage = next(iter(changes.values()))[0]
        stale = (
            f"stage {stage!r} of iteration {t} was done with other settings. "
            f"`selm redo {run.folder.path} {stage} -t {t}` does it again; another `output` keeps it"
        )
    return Preview(str(file), rows, +dropped, cut, tied, changed, stale)


def _made_from_other_data(run: Run, t: int, record: Mapping[str, dict]) -> str | None:
    """The first finished stage whose prompts or chat template differ from the present ones."""
    now = digests_of({"prompts": run.prompts(t), "chat": run.chat})
    for stage in _STAGES:
        before = record.get(stage, {}).get("inputs", {})
        if any(before.get(name, digest) != digest for name, digest in now.items()):
            return stage
    return None


def _from_data(run: Run, t: int) -> Preview:
    """Makes rows from the data: prompts alone, or with the data's answers as candidates."""
    e = run.experiment
    rows: list[Example | Alone] = []
    dropped, cut = Counter[str](), Counter[str]()
    for prompt in run.prompts(t):
        ids = prompt_ids(run.chat, prompt)
        texts = answers(prompt) if e.candidates.dataset else {}
        if not texts:
            rows.append(Alone(prompt.id, ids))
        elif e.text.layout == "paper":
            length = e.text.max_length, e.text.max_prompt_length
            row = paper_row(run.chat, prompt.messages, texts, *length)
            rows.append(Example.of(prompt.id, row.prompt, row.responses))
            cut.update(prompts_cut=row.prompt_cut, responses_cut=row.responses_cut)
        else:
            try:
                rows.append(run.data.own_answers.example(prompt) or Alone(prompt.id, ids))
            except UnusableAnswer:
                if e.data.on_bad_row == "error":
                    raise
                dropped["unusable_answer"] += 1
    with_answers = "with its answers" if e.candidates.dataset else "prompts alone"
    source = f"{e.data.train}, {with_answers}; the policy's answers are not there yet"
    return Preview(source, rows, dropped, cut)


def _changes(run: Run, t: int, record: Mapping[str, dict]) -> dict[str, tuple[str, object, object]]:
    """Finds settings that changed since a stage ran: key -> (stage, old value, new value)."""
    found: dict[str, tuple[str, object, object]] = {}
    for stage in (generate, teach if run.experiment.taught else rank, score):
        if stage.name in record:
            before, now = record[stage.name]["settings"], stage.recorded(run, t)
            for key in before.keys() | now.keys():
                if before.get(key) != now.get(key):
                    found.setdefault(key, (stage.name, before.get(key), now.get(key)))
    return found


def labels(row: Example | Alone) -> list[str]:
    """For each response of a row, its roles in one string, such as `chosen + explore`."""
    return [
        " + ".join(role for role in ROLES if place in row.playing(role) and role in row.roles)
        for place in range(len(row.responses))
    ]
