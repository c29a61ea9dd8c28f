"""Writes the tables of `selm lab compare` and `acquire` into docs/exploration.md and methods.md.

Copy lab_compare.json, lab_acquire.json and the figures (.svg) of a run into docs/images first.

python docs/exploration.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from selm_jax.lab.compare_page import markdown, of_controls, where
from selm_jax.lab.stats import Record

DOCS = Path(__file__).parent
ARM_OF = {"nash": "nash_md", "geb": "geb_complement", "optimism": "selm"}
BEGIN, END = "<!-- selm lab compare: the table -->\n", "<!-- end of the table -->\n"
RULES = "<!-- selm lab acquire: the table -->\n", "<!-- end of this table -->\n"


def exploration(text: str, compared: list[Record]) -> str:
    """The document with its table replaced by that of the records."""
    return _between(text, BEGIN, markdown(compared), END)


def acquisition(text: str, compared: list[Record]) -> str:
    """The document with its tables of acquisition rules replaced by those of the records."""
    begin, end = RULES
    return _between(text, begin, of_controls(compared), end)


def _between(text: str, begin: str, table: str, end: str) -> str:
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}{table}{end}{after}"


def methods(text: str, compared: list[Record]) -> str:
    """The page of methods with its last two columns replaced."""
    return "\n".join(_row(line, compared) for line in text.split("\n"))


def _row(line: str, compared: list[Record]) -> str:
    cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)][1:-1]
    if not line.startswith("| `") or len(cells) != 7:
        return line
    name = cells[0].strip("`")
    found = where(compared, ARM_OF.get(name, name)) if name != "dpo" else ["the baseline"] * 2
    return "| " + " | ".join([*cells[:5], *found]) + " |"


if __name__ == "__main__":
    for name, numbers, fill in (
        ("exploration.md", "lab_compare", exploration),
        ("exploration.md", "lab_acquire", acquisition),
        ("methods.md", "lab_compare", methods),
    ):
        records = json.loads((DOCS / f"images/{numbers}.json").read_text(encoding="utf-8"))
        file = DOCS / name
        file.write_text(fill(file.read_text(encoding="utf-8"), records), encoding="utf-8")
