"""The page of a laboratory experiment: its answer, figures and tables, and how it was made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from markupsafe import Markup

from selm_jax.report.curves import Plot
from selm_jax.report.files import Table
from selm_jax.report.page import SCRIPT, STYLE, policy, templates
from selm_jax.shell import artifacts

Interval = tuple[float | None, float | None, float | None]
"""A mean and the ends of its interval."""


@dataclass(frozen=True)
class Numbers:
    """A table with a caption; its files are called `name`. A cell can be an `Interval`."""

    name: str
    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[object]]

    @property
    def links(self) -> Markup:
        """Links to the unrounded numbers, with both ends of each interval in separate columns."""
        wide = [
            any(isinstance(row[i], tuple) for row in self.rows) for i in range(len(self.columns))
        ]
        columns = [
            f"{name}{end}"
            for name, is_interval in zip(self.columns, wide, strict=True)
            for end in (("", " low", " high") if is_interval else ("",))
        ]
        rows = [
            [value for cell in row for value in (cell if isinstance(cell, tuple) else (cell,))]
            for row in self.rows
        ]
        return Table(self.name, columns, rows).links


def write(
    out: Path,
    *,
    title: str,
    answer: Sequence[str],
    facts: Mapping[str, str],
    plots: Sequence[Plot],
    tables: Sequence[Numbers],
) -> None:
    """Writes the page, completely or not at all; the same values give the same bytes.

    Args:
      answer: the results in sentences; the first one counts them all.
      facts: what the header says: command, settings, versions, commit and date.
    """
    text = (
        templates()
        .get_template("lab.html.jinja")
        .render(
            title=title,
            answer=answer,
            facts_of=list(facts.items()),
            plots=plots,
            tables=tables,
            style=Markup(STYLE),
            script=Markup(SCRIPT),
            policy=policy(SCRIPT),
        )
    )
    artifacts.write_text(out, text)
