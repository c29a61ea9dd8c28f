"""Numbers that were published, as data: the SELM paper's tables and its authors' model cards.

Nothing here was measured by this software. Each file begins with where it comes from; whoever draws
these numbers says so in the drawing.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

NAMES = ("table1", "table2", "model_cards", "figure2_zephyr", "figure2_llama3")


@dataclass(frozen=True)
class Published:
    """Rows of text by column, and the source in words."""

    name: str
    source: str
    rows: tuple[dict[str, str], ...]

    def numbers(self, column: str, **where: str) -> list[tuple[dict[str, str], float]]:
        """The rows with these values that have a number in a column, and the number."""
        found = [row for row in self.rows if all(row[k] == v for k, v in where.items())]
        return [(row, float(row[column])) for row in found if row[column]]


def load(name: str) -> Published:
    """One of `NAMES`. Raises ValueError for another name."""
    if name not in NAMES:
        raise ValueError(f"no published numbers {name!r}; expected one of {', '.join(NAMES)}")
    lines = (Path(__file__).parent / f"{name}.csv").read_text(encoding="utf-8").splitlines()
    source = " ".join(line[1:].strip() for line in lines if line.startswith("#"))
    return Published(name, source, tuple(csv.DictReader(x for x in lines if not x.startswith("#"))))
