"""Reads experiment files: merges a file with its base, applies overrides, checks the settings.

Every error names the file, the line, the key and what was expected.
"""

from __future__ import annotations

import dataclasses
import datetime
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from selm_jax.config import plain_yaml, secrets
from selm_jax.config.consistency import inconsistencies
from selm_jax.config.heldout import HeldoutSet
from selm_jax.config.settings import Experiment, groups
from selm_jax.shell.words import did_you_mean

# Either `key.path=value` with the value as YAML, or a key and the value itself.
Override = str | tuple[str, Any]
Places = dict[tuple[str, ...], str]  # where a key was set: `line 7`, or `override`


class ConfigError(ValueError):
    """An experiment file, or an override on the command line, is not valid."""


def load(file: Path, overrides: Sequence[Override] = ()) -> Experiment:
    """Reads an experiment file and applies overrides: `key.path=value`, or a key and its value.

    A file may extend another file in the same folder: `base: selm.yaml`. Its settings then replace
    those of the base. Within a group only the given keys change, but groups whose keys depend on
    each other (`objective`, `feedback.settings`, `text.template`) are replaced as a whole.

    Raises:
      ConfigError: the file does not exist, is not plain YAML, is its own base, or is refused by
        `parse`.
    """
    tree, places = _on_its_base(Path(file))
    for override in overrides:
        _set(tree, places, *_key_and_value(override))
    return parse(tree, str(file), places)


def read(file: Path) -> dict[str, Any]:
    """Reads an unchecked mapping from YAML. Raises ConfigError if the file has no mapping."""
    return read_with_places(file)[0]


def read_with_places(file: Path) -> tuple[dict[str, Any], Places]:
    """Reads a YAML file's mapping, and the line number of each key."""
    try:
        tree, lines = plain_yaml.read_file(Path(file))
    except FileNotFoundError as e:
        raise ConfigError(f"{file}: no such experiment file") from e
    except IsADirectoryError as e:
        raise ConfigError(
            f"{file}: this is a folder; an experiment file (YAML) was expected. The one of a run "
            f"folder is {Path(file) / 'config.yaml'}"
        ) from e
    except plain_yaml.YamlError as e:
        raise ConfigError(f"{file}: {e}") from e
    if not isinstance(tree, dict):
        raise ConfigError(f"{file}: a mapping of settings was expected, found {shown(tree)}")
    return tree, {tuple(map(str, path)): f"line {line}" for path, line in lines.items()}


def _on_its_base(file: Path, above: tuple[Path, ...] = ()) -> tuple[dict[str, Any], Places]:
    """Reads a file's settings merged over those of its base; files in `above` extend this one."""
    if file.resolve() in above:
        raise ConfigError(
            f"{above[-1]}: its base, {file}, extends this file in turn. Name another base"
        )
    tree, places = read_with_places(file)
    if "base" not in tree:
        return tree, places
    name = tree.pop("base")
    if not isinstance(name, str):
        problem = f"base: {shown(name)}; the name of an experiment file was expected"
        raise ConfigError(listed(str(file), [problem], places))
    base = file.parent / name
    whole, below = _on_its_base(base, (*above, file.resolve()))
    _merge(whole, tree)
    return whole, {key: f"{base}, {place}" for key, place in below.items()} | places


def _merge(tree: dict[str, Any], changes: Mapping[str, Any], path: str = "") -> None:
    """Merges changes into a tree of settings in place, key by key within groups."""
    for key, value in changes.items():
        inner = f"{path}.{key}" if path else key
        known = tree.get(key)
        if inner in _GROUPS and isinstance(known, dict) and isinstance(value, Mapping):
            _merge(known, value, inner)
        else:
            tree[key] = value


_GROUPS = dict(groups(Experiment))


def parse(
    tree: Mapping[str, Any], where: str = "experiment", places: Places | None = None
) -> Experiment:
    """Checks a mapping of settings and turns it into an Experiment.

    Raises:
      ConfigError: keys are unknown, missing, of the wrong type or out of range (all are listed),
        settings contradict each other, or a value looks like a password.
    """
    refuse_secrets(tree, where, places)
    try:
        experiment = TypeAdapter(Experiment).validate_python(dict(tree))
    except ValidationError as e:
        raise ConfigError(listed(where, explained(e, Experiment), places)) from None
    if problems := list(inconsistencies(experiment)):
        raise ConfigError(listed(where, problems, places))
    return experiment


def refuse_secrets(tree: Any, where: str, places: Places | None = None) -> None:
    """Raises ConfigError if a setting looks like a key or password; the error does not show it."""
    problems = [f"{'.'.join(path)}: {how}" for path, how in secrets.found(tree)]
    if problems:
        raise ConfigError(f"{listed(where, problems, places)}\n  {secrets.INSTEAD}")


def dump(experiment: Experiment) -> str:
    """Writes all settings as YAML, with defaults; parsing the YAML gives the same experiment."""
    return plain_yaml.dump(as_dict(experiment))


def as_dict(part: Any) -> dict[str, Any]:
    """Converts an experiment, or one group of its settings, to plain lists and dictionaries."""

    def plain(x):
        if isinstance(x, datetime.date):
            return x.isoformat()
        return list(x) if isinstance(x, tuple) else x

    def build(items):
        return {key: plain(value) for key, value in items}

    return dataclasses.asdict(part, dict_factory=build)


def listed(where: str, problems: Sequence[str], places: Places | None = None) -> str:
    """Formats an error message that lists problems in a file, each with its line number."""
    lines = []
    for problem in problems:
        path = tuple(problem.partition(":")[0].split("."))
        known = [path[:n] for n in range(len(path), 0, -1) if path[:n] in (places or {})]
        place = f"{(places or {})[known[0]]}: " if known else ""
        lines.append(f"\n  {place}{problem}")
    return f"{where}:{''.join(lines)}"


def explained(error: ValidationError, root: type) -> list[str]:
    """Rewrites Pydantic's errors, each as `key: what was found, what was expected`."""
    return [line for each in error.errors() for line in _explain(each, root)]


def shown(value: Any) -> str:
    """Formats a value for an error message."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def _key_and_value(override: Override) -> tuple[str, Any]:
    if not isinstance(override, str):
        return override
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {key!r}: `key.path=value` was expected")
    try:
        return key, plain_yaml.read_value(text)
    except plain_yaml.YamlError as e:
        raise ConfigError(f"override {key}=...: the value cannot be read: {e}") from e


def _set(tree: dict[str, Any], places: Places, key: str, value: Any) -> None:
    path = tuple(key.split("."))
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise ConfigError(
                f"override {key}=...: {name} is not a group of settings; see `selm settings`"
            )
    tree[path[-1]] = value
    for known in [each for each in places if each[: len(path)] == path]:
        del places[known]
    places[path] = "override"


# What was expected, by the name that pydantic gives a type error.
_EXPECTED = {
    "string_type": "text was expected (in quotes, if it looks like a number or a truth value)",
    "bool_type": "true or false was expected",
    "dataclass_type": "a group of settings was expected",
    "dict_type": "a group of settings was expected",
}


def _explain(error: Mapping[str, Any], root: type) -> Iterator[str]:
    path = ".".join(str(x) for x in error["loc"])
    kind, found = error["type"], shown(error["input"])
    if kind in ("unexpected_keyword_argument", "extra_forbidden"):
        group = dict(groups(root)).get(".".join(map(str, error["loc"][:-1])), HeldoutSet)
        known = [f.name for f in dataclasses.fields(group)]
        hint = did_you_mean(str(error["loc"][-1]), known)
        yield f"{path}: unknown key{hint} Known here: {', '.join(known)}."
    elif kind in ("missing", "missing_argument"):
        yield f"{path}: missing"
    elif kind == "literal_error":
        known = re.findall("'([^']*)'", error["ctx"]["expected"])
        hint = did_you_mean(str(error["input"]), known)
        yield f"{path}: {found} is not allowed here{hint} Expected one of {', '.join(known)}."
    elif kind == "contradiction":
        yield from (f"{path}.{problem}" for problem in error["ctx"]["problems"])
    else:
        yield f"{path}: {found}, {_EXPECTED.get(kind, error['msg'])}"
