"""Writes the table of `selm lab compare` into docs/exploration.md and docs/methods.md.

Copy lab_compare.json and lab_compare.svg of a run into docs/images first.

python docs/exploration.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from selm_jax.lab.compare_page import markdown, where
from selm_jax.lab.stats import Record

DOCS = Path(__file__).parent
ARM_OF = {"nash": "nash_md", "geb": "geb_complement", "optimism": "selm"}
BEGIN, END = "<!-- selm lab compare: the table -->\n", "<!-- end of the table -->\n"


def exploration(text: str, compared: list[Record]) -> str:
    """The document with its table replaced by that of the records."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{markdown(compared)}{END}{after}"


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
    records = json.loads((DOCS / "images/lab_compare.json").read_text(encoding="utf-8"))
    for name, fill in (("exploration.md", exploration), ("methods.md", methods)):
        file = DOCS / name
        file.write_text(fill(file.read_text(encoding="utf-8"), records), encoding="utf-8")
