"""Generates docs/settings.md, which lists every setting with its default and range, from the code.

python docs/settings.py
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from selm_jax.config.reference import Setting, numbers_of, reference, sections
from selm_jax.feedback.mixture import WEIGHT
from selm_jax.feedback.ranker import BUILT_IN
from selm_jax.feedback.workers import user_function
from selm_jax.objectives.build import TABLE
from selm_jax.objectives.losses import RANGES
from selm_jax.shell.ranges import Range, ranges_of

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Every setting

`python docs/settings.py` generates this page from the code. Change a setting in the experiment file
or on the command line, as in `training.rows=8`; `selm settings` shows this reference in the
terminal. The file is YAML 1.2: `042` is 42, `yes` and `1:30` are strings, and a duplicate key is an
error. Where a number is expected, `true`, `"8"`, `.nan` and `.inf` are refused; `1e6` counts as a
whole number. A setting in **bold** has no default and must be given.
"""
_NUMBERS = ("where", "setting", "range", "default")


def page() -> str:
    parts = [HEAD]
    for section in sections():
        if rows := [_row(setting) for setting in reference(section)]:
            title = f"`{section}`" if section else "At the top"
            parts.append(_table(title, ("key", "values", "default", "meaning"), rows))
    losses = _numbers(TABLE, lambda _: RANGES)
    parts.append(_table("Numbers of `objective`", _NUMBERS, losses))
    weight = ("`mixture`", "`parts: weight`", str(WEIGHT), "`1`")
    rankers = [weight, *_numbers(_rankers(), ranges_of)]
    parts.append(_table("Numbers of `feedback.settings`", _NUMBERS, rankers))
    return "\n".join(parts)


def _row(setting: Setting) -> tuple[str, ...]:
    name = f"**`{setting.key}`**" if setting.default is None else f"`{setting.key}`"
    return name, setting.values, _code(setting.default), setting.text


def _numbers(
    functions: Mapping[str, Callable[..., Any]],
    ranges: Callable[[Callable[..., Any]], Mapping[str, Range]],
) -> Iterator[tuple[str, ...]]:
    for name, function in functions.items():
        for setting in numbers_of(function, ranges(function)):
            yield f"`{name}`", f"`{setting.key}`", setting.values, _code(setting.default)


def _rankers() -> dict[str, Callable[..., Any]]:
    found: dict[str, Callable[..., Any]] = {}
    for name, place in BUILT_IN.items():
        module, _, function = place.partition(":")
        found[name] = getattr(importlib.import_module(module), function)
    return found | {"a function of yours": user_function}


def _code(default: str | None) -> str:
    return f"`{default}`" if default else ""


def _table(title: str, head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {page().count(chr(10))} lines")
