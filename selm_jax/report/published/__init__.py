"""Loads published numbers: the tables of the SELM paper and of its authors' model cards.

This software did not measure any of them. Each file begins with its source, and drawings of these
numbers must be labelled as published.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

NAMES = ("table1", "table2", "model_cards", "figure2_zephyr", "figure2_llama3")


@dataclass(frozen=True)
class Published:
    """A table of published numbers: rows of text by column, and a description of the source."""

    name: str
    source: str
    rows: tuple[dict[str, str], ...]

    def numbers(self, column: str, **where: str) -> list[tuple[dict[str, str], float]]:
        """The rows that match `where` and have a number in a column, each with that number."""
        found = [row for row in self.rows if all(row[k] == v for k, v in where.items())]
        return [(row, float(row[column])) for row in found if row[column]]


def load(name: str) -> Published:
    """Loads the published table `name`, one of `NAMES`. Raises ValueError for any other name."""
    if name not in NAMES:
        raise ValueError(f"no published numbers {name!r}; expected one of {', '.join(NAMES)}")
    lines = (Path(__file__).parent / f"{name}.csv").read_text(encoding="utf-8").splitlines()
    source = " ".join(line[1:].strip() for line in lines if line.startswith("#"))
    return Published(name, source, tuple(csv.DictReader(x for x in lines if not x.startswith("#"))))
