"""Documents all settings: each one's allowed values, its default, and what it does.

    for setting in reference("rollout"):
        print(setting.key, setting.values, setting.default, setting.text)

The source is the classes in `settings.py`: a field's type hint gives the allowed values, and the
comment beside it the description. `selm settings` and docs/settings.md show this reference.
"""

from __future__ import annotations

import dataclasses
import datetime
import inspect
import io
import tokenize
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

from selm_jax.config.settings import Experiment, groups
from selm_jax.shell.ranges import Range, ranges_of


@dataclasses.dataclass(frozen=True)
class Setting:
    """The documentation of one setting, as `selm settings` shows it.

    Attributes:
      key: its dotted key, such as `training.rows`.
      values: the allowed values in words: the type with its range or its names.
      default: the default in YAML; None for a setting that must be given, "" for a group whose
        settings have defaults of their own.
      text: what the setting does.
    """

    key: str
    values: str
    default: str | None
    text: str


def sections() -> tuple[str, ...]:
    """The dotted keys of the groups of settings; "" is the top level of an experiment file."""
    return tuple(path for path, _ in groups(Experiment))


def reference(section: str = "") -> Iterator[Setting]:
    """Yields the documentation of a section's settings, in the order of their declaration.

    Raises:
      KeyError: there is no such section.
    """
    group = dict(groups(Experiment))[section]
    hints, ranges = get_type_hints(group, include_extras=True), ranges_of(group)
    texts = _comments(group)
    for field in dataclasses.fields(group):
        key = f"{section}.{field.name}" if section else field.name
        if key in sections():
            values = f"a group, see `{key}`"
        else:
            values = _values(hints[field.name], ranges.get(field.name))
        yield Setting(key, values, _default(field), texts.get(field.name, ""))


def numbers_of(function: Callable[..., Any], ranges: Mapping[str, Range]) -> Iterator[Setting]:
    """Yields the numeric parameters of a loss or ranker function as settings.

    Args:
      ranges: the range of each parameter to list.
    """
    for key, parameter in inspect.signature(function).parameters.items():
        if key in ranges:
            required = parameter.default is parameter.empty
            default = None if required else as_yaml(parameter.default)
            yield Setting(key, str(ranges[key]), default, "")


def as_yaml(value: Any) -> str:
    """Formats a default value as YAML, as in an experiment file."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(as_yaml, value))}]"
    return str(value) or '""'


def _default(field: dataclasses.Field[Any]) -> str | None:
    if field.default_factory is not dataclasses.MISSING:
        return as_yaml(field.default_factory())
    if field.default is dataclasses.MISSING:
        return None
    return "" if dataclasses.is_dataclass(field.default) else as_yaml(field.default)


_WORDS = {str: "text", bool: "true or false", dict: "a group", datetime.date: "a date"}


def _values(hint: Any, numbers: Range | None) -> str:
    """Describes in words the values that a type hint allows."""
    inner, leaves = get_args(hint), _leaves(hint)
    choices = [c for each in (hint, *inner) if get_origin(each) is Literal for c in get_args(each)]
    if numbers is not None:
        text = f"{numbers}, or a list of such" if tuple in leaves else str(numbers)
    elif choices:
        text = ", ".join(f"`{each}`" for each in choices)
    else:
        text = next(_WORDS[each] for each in leaves if each in _WORDS)
        text = f"{text}, or a list of such" if tuple in leaves else text
    return f"{text}, or null" if types.NoneType in inner else text


def _leaves(hint: Any) -> list[Any]:
    """Lists the plain types inside a nested type hint, outermost first."""
    origin, inner = get_origin(hint), get_args(hint)
    own = [origin] if isinstance(origin, type) else []
    return [*own, *(leaf for each in inner for leaf in _leaves(each))] if inner else [hint]


def _comments(group: type) -> dict[str, str]:
    """Reads the comments on a class's fields: after a field, or above it if capitalised."""
    source = "".join(inspect.getsource(each) for each in reversed(group.__mro__[:-1]))
    names = {each.name for each in dataclasses.fields(group)}
    found: dict[str, list[str]] = {}
    above: list[str] = []
    field, depth = "", 0
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
