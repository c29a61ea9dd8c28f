"""Writes docs/settings.md: every setting of an experiment, its default and its range, from the code.

python docs/settings.py
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib
import inspect
import io
import tokenize
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from selm_jax.config import Experiment, settings
from selm_jax.config.settings import groups
from selm_jax.feedback.mixture import WEIGHT
from selm_jax.feedback.ranker import BUILT_IN
from selm_jax.feedback.workers import user_function
from selm_jax.objectives.build import TABLE
from selm_jax.objectives.losses import RANGES
from selm_jax.shell.ranges import Range, ranges_of

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Every setting

Made from the code by `python docs/settings.py`. A setting is changed in the file or on the command line, such as
`training.rows=8`. The file is YAML 1.2: `042` is 42, `yes` and `1:30` are texts, and a key that is given twice is an error.
Numbers are numbers: `true`, `"8"`, `.nan` and `.inf` are none, and 1e6 is a whole one. What is **bold** has no default and must be given.
"""


def page() -> str:
    parts = [HEAD]
    for path, group in groups(Experiment):
        rows = list(_fields(path, group))
        if rows:
            title = f"`{path}`" if path else "At the top"
            parts.append(_table(title, ("key", "values", "default", "meaning"), rows))
    parts.append(_table("Numbers of `objective`", _NUMBERS, list(_of_objectives())))
    parts.append(_table("Numbers of `feedback.settings`", _NUMBERS, list(_of_rankers())))
    return "\n".join(parts)


def _fields(path: str, group: type) -> Iterator[tuple[str, ...]]:
    hints = typing.get_type_hints(group, include_extras=True)
    ranges, notes = ranges_of(group), _comments(group)
    inner = {key for key, _ in groups(Experiment)}
    for field in dataclasses.fields(group):
        key = f"{path}.{field.name}" if path else field.name
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        required = default is dataclasses.MISSING
        if key in inner:
            values = f"a group, see `{key}`"
        else:
            values = _values(hints[field.name], ranges.get(field.name))
        shown = "" if required or dataclasses.is_dataclass(default) else f"`{_yaml(default)}`"
        name = f"**`{key}`**" if required else f"`{key}`"
        yield name, values, shown, notes.get(field.name, "")


def _values(hint: Any, numbers: Range | None) -> str:
    """What a field may be, in words."""
    inner = typing.get_args(hint)
    optional = types.NoneType in inner
    if numbers is not None:
        text = str(numbers)
        if tuple in _leaves(hint):
            text += ", or a list of such"
    elif choices := [
        c for each in (hint, *inner) for c in typing.get_args(each) if each and _is_choice(each)
    ]:
        text = ", ".join(f"`{each}`" for each in choices)
    else:
        kinds = [each for each in _leaves(hint) if each is not types.NoneType]
        words = {str: "text", bool: "true or false", dict: "a group", datetime.date: "a day"}
        text = words[next(each for each in kinds if each in words)]
    return f"{text}, or null" if optional else text


def _is_choice(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Literal


def _leaves(hint: Any) -> list[Any]:
    """The plain types that a hint is made of, the outermost first."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    own = [origin] if isinstance(origin, type) else []
    return [*own, *(leaf for each in inner for leaf in _leaves(each))] if inner else [hint]


_NUMBERS = ("where", "setting", "range", "default")


def _of_objectives() -> Iterator[tuple[str, ...]]:
    for name, factory in TABLE.items():
        for key, parameter in inspect.signature(factory).parameters.items():
            if key in RANGES:
                yield f"`{name}`", f"`{key}`", str(RANGES[key]), _default(parameter)


def _of_rankers() -> Iterator[tuple[str, ...]]:
    builders: dict[str, Any] = {}
    for name, place in BUILT_IN.items():
        module, _, function = place.partition(":")
        builders[name] = getattr(importlib.import_module(module), function)
    builders["a function of yours"] = user_function
    yield "`mixture`", "`parts: weight`", str(WEIGHT), "`1`"
    for name, builder in builders.items():
        parameters = inspect.signature(builder).parameters
        for key, numbers in ranges_of(builder).items():
            yield f"`{name}`", f"`{key}`", str(numbers), _default(parameters[key])


def _default(parameter: inspect.Parameter) -> str:
    return "" if parameter.default is parameter.empty else f"`{_yaml(parameter.default)}`"


def _yaml(value: Any) -> str:
    words: Mapping[Any, str] = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    if isinstance(value, float):
        return f"{value:g}"
    return str(value) or '""'


def _comments(group: type) -> dict[str, str]:
    """The comments of a dataclass by field: behind it, and above it where they begin with a capital."""
    source = "".join(inspect.getsource(each) for each in reversed(group.__mro__[:-1]))
    found: dict[str, list[str]] = {}
    above: list[str] = []
    field = ""
    names = {each.name for each in dataclasses.fields(group)}
    depth = 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.OP:
            depth += (token.string in "([{") - (token.string in ")]}")
        elif token.type == tokenize.NAME and token.string in names and not depth:
            before, after = token.line[: token.start[1]], token.line[token.end[1] :]
            if not before.strip() and after.startswith(":"):
                field = token.string
                found[field], above = above, []
        elif token.type == tokenize.COMMENT:
            text = token.string.removeprefix("#").strip()
            own_line = token.line.strip().startswith("#")
            if own_line and (above or text[0].isupper()):
                above.append(text)
            elif field:
                found[field].append(text)
    return {name: " ".join(lines) for name, lines in found.items()}


def _table(title: str, head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [f"## {title}", "", f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {page().count(chr(10))} lines, from {settings.__file__}")
