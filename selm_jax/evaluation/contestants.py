"""Who is compared, as the command line names them: `[NAME=]SOURCE[,SOURCE...]`."""

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
    """A name, and what stands behind it: models (several are seeds of one method) or a file."""

    name: str
    models: tuple[Found, ...] = ()
    file: Path | None = None


def contestants(
    names: Sequence[str], *, iteration: int | None, revision: str | None, files: bool
) -> list[Contestant]:
    """Reads the arguments.

    Args:
      files: whether `.jsonl` files of answers may stand for models.

    Raises:
      EvaluationError: two of one name, or a source that is not there.
    """
    out = []
    for text in names:
        name, equals, rest = text.partition("=")
        name, rest = (name, rest) if equals else ("", text)
        if files and rest.endswith(".jsonl"):
            file = place(rest)
            if not file.is_file():
                raise EvaluationError(f"{rest}: no such file of answers; found from {Path.cwd()}")
            out.append(Contestant(name or file.stem, file=file))
            continue
        parts = [p for p in rest.split(",") if p]
        if not parts or (files and len(parts) > 1):
            raise EvaluationError(f"{text!r}: one model{' or file' if files else ''} was expected")
        models = tuple(find(p, iteration=iteration, revision=revision) for p in parts)
        out.append(Contestant(name or models[0].name, models))
    seen = [c.name for c in out]
    if twice := {n for n in seen if seen.count(n) > 1}:
        raise EvaluationError(
            f"{', '.join(sorted(twice))} stands there twice; tell them apart as NAME=SOURCE"
        )
    return out


def build_ranker(
    name: str | None, settings: Sequence[str], found: Sequence[Found]
) -> rankers.Ranker:
    """The ranker of the command line (`--ranker`, `--set key=value`), else the first run's.

    Raises:
      EvaluationError: nobody names one, or a setting that is no `key=value`.
      ConfigError: a setting looks like a key or password.
      FeedbackError: see `ranker.build`.
    """
    given = read_settings(settings, "--set")
    if name is not None:
        return rankers.build(name, **given)
    experiment = next((f.experiment for f in found if f.experiment), None)
    if experiment is None:
        raise EvaluationError(
            f"--ranker names who judges: one of {', '.join(rankers.BUILT_IN)}, or your own "
            "package.module:function. Without it a run's own ranker serves; no run was given"
        )
    return rankers.build(experiment.feedback.ranker, **(experiment.feedback.settings | given))


def read_settings(settings: Sequence[str], option: str) -> dict[str, Any]:
    """The values of an option that is given as `key=value`, any number of times.

    Raises:
      EvaluationError: one is no `key=value`, or its value is no YAML.
      ConfigError: one looks like a key or password.
    """
    given: dict[str, Any] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals:
            raise EvaluationError(f"{option} {key!r}: key=value was expected (the value is YAML)")
        try:
            given[key] = read_value(value)
        except YamlError as error:
            raise EvaluationError(f"{option} {key}=...: the value: {error}") from None
    refuse_secrets(given, option)
    return given
