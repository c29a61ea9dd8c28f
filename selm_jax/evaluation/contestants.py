"""Parses the command line's models to compare, each written `[NAME=]SOURCE[,SOURCE...]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from selm_jax.config import refuse_secrets
from selm_jax.config.plain_yaml import YamlError, read_value
from selm_jax.evaluation import EvaluationError
from selm_jax.evaluation.model import Found, find
from selm_jax.feedback import ranker as rankers
from selm_jax.shell.paths import place


@dataclass(frozen=True)
class Contestant:
    """A method to compare: a name, with its models (one per seed) or a file of answers."""

    name: str
    models: tuple[Found, ...] = ()
    file: Path | None = None


def contestants(
    names: Sequence[str], *, iteration: int | None, revision: str | None, files: bool
) -> list[Contestant]:
    """Parses the models or answer files of the command line into methods with distinct names.

    Args:
      files: whether `.jsonl` files of answers are allowed in place of models.

    Raises:
      EvaluationError: two arguments have the same name, or a source does not exist.
    """
    out = []
    for text in names:
        name, equals, rest = text.partition("=")
        name, rest = (name, rest) if equals else ("", text)
        if files and rest.endswith(".jsonl"):
            file = place(rest)
            if not file.is_file():
                raise EvaluationError(
                    f"{rest}: this file of answers does not exist (looked for in {Path.cwd()})"
                )
            out.append(Contestant(name or file.stem, file=file))
            continue
        parts = [p for p in rest.split(",") if p]
        if not parts or (files and len(parts) > 1):
            raise EvaluationError(
                f"{text!r}: expected one model"
                f"{' or file; comma-separated models work in `selm eval heldout`' if files else ''}"
            )
        models = tuple(find(p, iteration=iteration, revision=revision) for p in parts)
        out.append(Contestant(name or models[0].name, models))
    seen = [c.name for c in out]
    if twice := {n for n in seen if seen.count(n) > 1}:
        raise EvaluationError(
            f"the name {', '.join(sorted(twice))} is given twice; give each its own name "
            "with NAME=SOURCE"
        )
    return out


def ranker_for(name: str | None, settings: Sequence[str], found: Sequence[Found]) -> rankers.Ranker:
    """Builds the ranker of --ranker and --set or, without --ranker, the ranker of the first run.

    Raises:
      EvaluationError: no ranker is given, or a setting is not of the form `key=value`.
      ConfigError: a setting looks like a key or password.
      FeedbackError: see `ranker.build_ranker`.
    """
    given = read_settings(settings, "--set")
    if name is not None:
        return rankers.build_ranker(name, **given)
    experiment = next((f.experiment for f in found if f.experiment), None)
    if experiment is None:
        raise EvaluationError(
            "no ranker: without --ranker a run's own ranker is used, and no run was given. Give "
            f"--ranker with one of {', '.join(rankers.BUILT_IN)}, or your own "
            "package.module:function"
        )
    return rankers.build_ranker(
        experiment.feedback.ranker, **(experiment.feedback.settings | given)
    )


def read_settings(settings: Sequence[str], option: str) -> dict[str, Any]:
    """Parses the values of a repeatable `key=value` option into a dictionary.

    Raises:
      EvaluationError: a setting is not of the form `key=value`, or its value is not YAML.
      ConfigError: a setting looks like a key or password.
    """
    given: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise EvaluationError(f"{option} {key!r}: expected key=value (the value is YAML)")
        try:
            given[key] = read_value(value)
        except YamlError as error:
            message = f"{option} {key}=...: the value cannot be read: {error}"
            raise EvaluationError(message) from None
    refuse_secrets(given, option)
    return given
