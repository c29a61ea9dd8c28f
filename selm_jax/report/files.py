"""Offers a page's tables and plots as files (CSV, LaTeX, PDF) inside download links.

A page is one file, so each link contains its file, encoded as base64.
"""

from __future__ import annotations

import base64
import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

Cell = object
_KINDS = {"csv": "text/csv", "tex": "application/x-tex", "pdf": "application/pdf"}
_LATEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "%": r"\%",
    "#": r"\#", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\textquotedbl{}",
    "\n": " ", "\r": " ", "\t": " ", "\N{MINUS SIGN}": "$-$", "\N{EN DASH}": "--",
    "\N{NO-BREAK SPACE}": "~",
}  # fmt: skip


@dataclass(frozen=True)
class Table:
    """A named table of columns and rows. None is an empty cell; numbers stay numbers."""

    name: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    @property
    def links(self) -> Markup:
        """Download links to the table as CSV and as LaTeX."""
        tables = {"csv": csv_text, "tex": latex_text}
        return Markup(" ").join(
            link(self.name, kind, make(self.columns, self.rows).encode("utf-8", "replace"))
            for kind, make in tables.items()
        )


def csv_text(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Formats rows as comma-separated values with a header line.

    Text that a spreadsheet would run as a formula gets an apostrophe in front of it.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in (columns, *rows):
        writer.writerow([_plain(cell) for cell in row])
    return out.getvalue()


def _plain(cell: Cell) -> str:
    if (number := _number(cell)) is not None:
        return number
    return no_formula(str(cell))


def no_formula(text: str) -> str:
    """Puts an apostrophe before a text that a spreadsheet would run as a formula."""
    return f"'{text}" if re.match(r"\s*[=+\-@\t\r]", text) else text


def _number(cell: Cell) -> str | None:
    """Formats a cell's number with six digits; "" for a missing number, None for text."""
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return ""
    if isinstance(cell, bool) or not isinstance(cell, int | float):
        return None
    return str(cell) if isinstance(cell, int) else f"{cell:.6g}"


def latex_text(columns: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """Formats rows as a LaTeX `tabular` in booktabs style, with special characters escaped."""
    numbers = [all(_number(row[i]) is not None for row in rows) for i in range(len(columns))]
    lines = [
        r"\begin{tabular}{" + "".join("r" if n else "l" for n in numbers) + "}",
        r"\toprule",
        " & ".join(map(_latex, columns)) + r" \\",
        r"\midrule",
        *(" & ".join(map(_latex, row)) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    return "% \\usepackage{booktabs}\n" + "\n".join(lines) + "\n"


def _latex(cell: Cell) -> str:
    number = _number(cell)
    if number is not None:
        return f"${number}$" if number.startswith("-") else number or "--"
    text = "".join(_LATEX.get(sign, sign) for sign in str(cell))
    # LaTeX would read a bracket after the end of a row as an argument.
    return f"{{{text}}}" if text.startswith(("[", "*")) else text


def link(name: str, kind: str, content: bytes) -> Markup:
    """An HTML download link that saves `content` as the file NAME.KIND."""
    file = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip("_.") or "table"
    data = base64.b64encode(content).decode()
    label = {"tex": "LaTeX"}.get(kind, kind.upper())
    return Markup(
        f'<a class="save" download="{file}.{kind}" href="data:{_KINDS[kind]};base64,{data}" '
        f'aria-label="Save {file} as {label}">{label}</a>'
    )
