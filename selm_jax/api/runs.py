"""Runs whole experiments from Python, and reads their results as pandas tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from selm_jax.commands import runs
from selm_jax.iterate import iterate
from selm_jax.report.data import RunData, report_data
from selm_jax.shell import artifacts
from selm_jax.shell.mirror import entered, look
from selm_jax.tables import ranked

if TYPE_CHECKING:
    import pandas as pd


def run(
    experiment: str | Path, settings: Mapping[str, Any] | None = None, *, tiny: bool = False
) -> RunFolder:
    """Runs an experiment like `selm run`, or continues a stopped one.

    Args:
      experiment: an experiment file (YAML).
      settings: changed settings by their dotted keys, such as `{"training.learning_rate": 1e-6}`.
      tiny: rehearses the experiment with a tiny random model and made-up rows.

    Returns:
      The results, as `read` returns them.

    Raises:
      ConfigError: the file is not an experiment, or a setting is unknown or out of its range.
    """
    given = list((settings or {}).items())
    work = runs.opened(entered(str(experiment)), given, tiny=tiny, processes=True)
    iterate(work)
    return read(work.folder.path)


def read(folder: str | Path) -> RunFolder:
    """Opens a run folder, finished or not, and checks its files against recorded digests.

    Raises:
      FileNotFoundError: this is not a run folder.
      ReportError: a file has changed since the run wrote it; the message names the file.
    """
    path = entered(str(folder))
    return RunFolder(path, report_data(look(path)))


@dataclasses.dataclass(frozen=True, repr=False)
class RunFolder:
    """A run folder, opened by `selm.read`, with its tables as pandas DataFrames.

    Attributes:
      path: the folder.
      data: everything that the report shows.
    """

    path: Path
    data: RunData

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """A DataFrame of metrics with one row per update and per evaluation.

        The columns are `stage` ("train" or "evaluate"), `iteration`, `step` (the number of an
        update, from 1 in each iteration) and one per metric.
        """
        updates = [
            {"stage": "train", "iteration": each.iteration, "step": each.step} | dict(each.metrics)
            for each in self.data.updates
        ]
        evaluations = [
            {"stage": "evaluate", "iteration": t} | dict(metrics)
            for t, metrics in self.data.evaluations.items()
        ]
        return _table([*updates, *evaluations], ["stage", "iteration", "step"])

    @cached_property
    def answers(self) -> pd.DataFrame:
        """A DataFrame of answers with one row per candidate of every iteration.

        Columns include the prompt, text, score, rank (1 is best), the roles (`chosen`, `rejected`,
        `explore`), and the reason if the prompt was dropped.
        """
        return _table(
            [{"iteration": t} | vars(row) for t, row in self._ranked()],
            ["iteration", "prompt_id", "prompt", "source", "text", "score"],
        ).drop(columns="token_ids", errors="ignore")

    @cached_property
    def pairs(self) -> pd.DataFrame:
        """A DataFrame of training pairs with one row per pair.

        The columns are iteration, prompt_id, prompt, the texts of `chosen`, `rejected` and
        `explore` (the first if there are several), score_chosen and score_rejected.
        """
        found: dict[tuple[int, str], dict[str, Any]] = {}
        for t, row in self._ranked():
            for role in ("chosen", "rejected", "explore"):
                if getattr(row, role):
                    about = {"iteration": t, "prompt_id": row.prompt_id, "prompt": row.prompt}
                    pair = found.setdefault((t, row.prompt_id), about)
                    pair.setdefault(role, row.text)
                    if role != "explore":
                        pair[f"score_{role}"] = row.score
        columns = ["chosen", "rejected", "explore", "score_chosen", "score_rejected"]
        return _table(list(found.values()), ["iteration", "prompt_id", "prompt", *columns])

    @cached_property
    def heldout(self) -> pd.DataFrame:
        """A DataFrame with one row per held-out answer.

        Columns include the iteration (0 is the start model), prompt, text, the ranker's score, and
        the answer's log-probability in nats under the policy that wrote it (`logp`) and under the
        start model (`logp_start`).
        """
        rows = [{"iteration": each.iteration} | vars(each) for each in self.data.answers]
        columns = ["iteration", "prompt_id", "prompt", "kind", "text", "score"]
        return _table(rows, columns).drop(columns="token_ids", errors="ignore")

    def _ranked(self) -> Iterator[tuple[int, ranked.Row]]:
        for t, folder in artifacts.iterations(self.path).items():
            if (file := folder / "ranked.parquet").exists():
                yield from ((t, row) for row in ranked.read(file, token_ids=False))

    def __repr__(self) -> str:
        rest = "".join(f"\n  {each}" for each in self.data.unfinished)
        return f"{self.path}: {self.data.method}, {len(self.data.updates)} updates{rest}"


def _table(rows: list[dict[str, Any]], first: list[str]) -> pd.DataFrame:
    """Makes a DataFrame that begins with the columns `first`, even if there are no rows."""
    import pandas as pd

    others = dict.fromkeys(key for row in rows for key in row if key not in first)
    return pd.DataFrame(rows, columns=[*first, *others])
