"""Turns a Matplotlib figure into an SVG for the page, a PDF for a paper, and a CSV of its data.

Matplotlib draws with placeholder colours that represent roles. In the SVG, each becomes a CSS
variable, so that one drawing works on light and dark pages; in the PDF, it becomes the colour of
the light page.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.colors
import matplotlib.style
from markupsafe import Markup
from matplotlib.artist import Artist
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.text import Text

from selm_jax.report.files import csv_text

_LIGHT = {
    "ink": "#1d2127", "muted": "#5b626d", "grid": "#e4e4de", "surface": "#ffffff",
    "c0": "#1c6fc4", "c1": "#942c10", "c2": "#00594a", "c3": "#743080", "c4": "#8a6800",
    "c5": "#68737c",
}  # fmt: skip  # page.css, light
_ROLES = tuple(_LIGHT)
COLOUR = {role: f"#fe00{index:02x}" for index, role in enumerate(_ROLES)}
RC = {
    "svg.hashsalt": "selm_jax.report",  # without it, ids would differ every time
    "svg.fonttype": "none",  # text stays text: small, searchable, in the page's own font
    "pdf.fonttype": 3,  # embedded; with TrueType (42), a page would take twice as long
    "path.simplify_threshold": 0.4,  # points: makes long curves small without a visible change
    "font.size": 9.5,
    "axes.unicode_minus": True,
    "text.usetex": False,
}
LONGEST = 3000
"""Maximum rows in a plot's CSV on the page. Longer data is thinned; metrics.jsonl has all of it."""


@dataclass(frozen=True)
class Drawing:
    """A plot as `svg` for a page, as `pdf` with its own title and legend, and its data as `csv`."""

    svg: Markup
    pdf: bytes
    csv: str


def drawn(
    figure: Figure, key: str, alt: str, rows: Sequence[Mapping[str, object]], title: str = ""
) -> Drawing:
    """Draws a figure as SVG and PDF; `key` makes SVG ids unique, `alt` describes the figure."""
    thin = rows[:: -(-len(rows) // LONGEST) or 1]
    columns = list(dict.fromkeys(name for row in thin for name in row))
    data = csv_text(columns, [[row.get(name) for name in columns] for row in thin])
    return Drawing(inline(figure, key, alt), _paper(figure, title), data)


def _paper(figure: Figure, title: str) -> bytes:
    """Draws the figure as a PDF. This modifies the figure, so call the function last."""
    (axes,) = figure.axes
    handles, labels = axes.get_legend_handles_labels()
    named = {name: handle for handle, name in zip(handles, labels, strict=True) if name}
    if len(named) > 1:
        legend = figure.legend(
            list(named.values()), list(named), loc="outside lower left", ncols=3, frameon=False
        )
        for text in legend.get_texts():
            text.set_parse_math(False)  # a dollar sign in a run's name must not start a formula
    axes.set_title(title, loc="left", fontsize=10, parse_math=False)
    in_light_colours(figure)
    buffer = io.BytesIO()
    nothing = dict.fromkeys(("CreationDate", "Creator", "Producer"))
    with matplotlib.style.context(RC):
        figure.savefig(buffer, format="pdf", facecolor="white", metadata=nothing)
    return buffer.getvalue()


def in_light_colours(figure: Figure) -> None:
    """Replaces the placeholder colours of a figure by the colours of the light page."""
    for artist in figure.findobj():
        _in_light_colours(artist)


def _in_light_colours(artist: Artist) -> None:
    match artist:
        case PolyCollection():
            artist.set_facecolor([_light(colour) for colour in artist.get_facecolor()])
        case Line2D():
            artist.set_color(_light(artist.get_color()))
            artist.set_markerfacecolor(_light(artist.get_markerfacecolor()))
            artist.set_markeredgecolor(_light(artist.get_markeredgecolor()))
        case Patch():
            artist.set_facecolor(_light(artist.get_facecolor()))
            artist.set_edgecolor(_light(artist.get_edgecolor()))
        case Text():
            artist.set_color(_light(artist.get_color()))


def _light(colour: Any) -> Any:
    """Replaces a placeholder colour by the light page's; returns other colours unchanged."""
    if isinstance(colour, str) and colour == "none":
        return colour
    rgba = matplotlib.colors.to_rgba(colour)
    name = matplotlib.colors.to_hex(rgba)  # without alpha
    found = {COLOUR[role]: _LIGHT[role] for role in _ROLES}.get(name)
    return colour if found is None else (*matplotlib.colors.to_rgb(found), rgba[3])


def inline(figure: Figure, key: str, alt: str) -> Markup:
    """Draws the figure as an inline `<svg>` element, without an XML prolog and with unique ids."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    svg = buffer.getvalue()
    view = re.search(r'viewBox="([^"]*)"', svg)
    body = re.search(r"<svg[^>]*>(.*)</svg>", svg, re.DOTALL)
    assert view and body, "matplotlib did not write an svg element with a viewBox"
    inner = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", body[1], flags=re.DOTALL)
    inner = re.sub(r"font-family: [^;\"]*;? ?", "", inner)
    inner = re.sub(r"#fe00([0-9a-f]{2})", lambda m: f"var(--{_ROLES[int(m[1], 16)]})", inner)
    inner = inner.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', inner))
    inner = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", inner)
    inner = re.sub(r'(href="#|url\(#)', lambda m: f"{m[1]}{key}-", inner)
    inner = re.sub(r'\b(?:d|x|y|transform)="[^"]*"', _short_numbers, inner)
    inner = re.sub(r">\s+<", "><", inner).strip()
    return Markup(
        f'<svg class="plot" viewBox="{view[1]}" role="img" aria-label="{html.escape(alt)}">'
        f"{inner}</svg>"
    )


def _short_numbers(match: re.Match[str]) -> str:
    """Cuts SVG coordinates to hundredths of a point, more precise than any screen."""
    text = re.sub(r"(\.\d\d)\d+", r"\1", match[0])
    return re.sub(r"\s*\n\s*", " ", text)
