"""`selm redo RUN STAGE -t T`: deletes the results of a stage and of all that depend on it.

Only the outputs that the stage's entry in `stage.json` names are deleted. A file that somebody else
put into a folder of the run stays.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from selm_jax.shell import artifacts, loglines
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.json_file import read_object
from selm_jax.shell.one_process import only_one
from selm_jax.shell.words import did_you_mean
from selm_jax.stages.evaluate import evaluate
from selm_jax.stages.export import export
from selm_jax.stages.generate import generate
from selm_jax.stages.rank import rank
from selm_jax.stages.score import score
from selm_jax.stages.train import train

ORDER = (generate, rank, score, train, export, evaluate)  # of an iteration


class RedoError(RuntimeError):
    """The results of a stage could not be deleted. Nothing was changed; the message says why."""


def redo(run: Path, stage: str, t: int) -> list[str]:
    """Deletes the results of a stage of iteration t and of all stages that depend on it.

    Returns:
      a line for each stage that was forgotten, and for each file that was left.

    Raises:
      RedoError: the folder is not a run folder, there is no such stage, or it has not begun.
      ArtifactError: another process is using the run folder.
    """
    known = [each.name for each in ORDER]
    if stage not in known:
        raise RedoError(
            f"{stage}: no such stage{did_you_mean(stage, known)} Stages: {', '.join(known)}"
        )
    if not (mirrors.look(run) / "config.yaml").exists():
        raise RedoError(f"{run} has no config.yaml, so it is not a run folder. Check the path")
    with only_one(run):
        entries = {u: _entries(folder) for u, folder in artifacts.iterations(run).items()}
        if stage not in entries.get(t, {}):
            raise RedoError(
                f"{run}: stage {stage!r} of iteration {t} has not begun, so there is nothing to "
                "delete; `selm show` lists what is done"
            )
        if stage == export.name and not mirrors.exists(run / f"iteration_{t}" / "checkpoints"):
            stage = train.name  # an export deletes what it was made from
        forgotten = [(u, name) for u, name in _following(stage, t, entries) if name in entries[u]]
        _check_models(run, forgotten, entries)
        return list(_forget(run, forgotten, entries))


def _following(
    stage: str, t: int, entries: Mapping[int, Mapping[str, Any]]
) -> Iterator[tuple[int, str]]:
    """Yields the stage and all that depend on it as (iteration, name), latest first."""
    names = [each.name for each in ORDER]
    for u in sorted(entries, reverse=True):
        for name in reversed(names):
            after = u > t or (u == t and names.index(name) > names.index(stage))
            if stage == evaluate.name:
                # Later evaluations are compared with the start model's answers, and no others.
                after = t == 0 and u > 0 and name == evaluate.name
            if after or (u, name) == (t, stage):
                yield u, name


def _check_models(
    run: Path, forgotten: list[tuple[int, str]], entries: Mapping[int, Mapping[str, Any]]
) -> None:
    """Raises RedoError if the first iteration to run again starts from a deleted model."""
    first = min(u for u, _ in forgotten)
    if first > 1 and {name for u, name in forgotten if u == first} != {evaluate.name}:
        entry = entries.get(first - 1, {}).get(export.name, {})
        model = run / f"iteration_{first - 1}" / "model"
        if entry.get("done") and not mirrors.exists(model):
            raise RedoError(
                f"iteration {first} would start from the model {model}, which has been deleted "
                "(`keep_models: last` does so). To start from the beginning, run "
                f"`selm redo {run} generate -t 1`"
            )


def _forget(
    run: Path, forgotten: list[tuple[int, str]], entries: Mapping[int, Mapping[str, Any]]
) -> Iterator[str]:
    stages = {each.name: each for each in ORDER}
    for u, name in forgotten:
        folder = run / f"iteration_{u}"
        entry = entries[u][name]
        # The entry goes first: killed after that, the run does the stage again over what is left.
        rest = {k: v for k, v in _entries(folder).items() if k != name}
        artifacts.write_json(folder / "stage.json", rest)
        loglines.rewrite_lines(
            run / "metrics.jsonl", lambda m, u=u, n=name: (m["stage"], m["iteration"]) != (n, u)
        )
        yield f"iteration {u}  {name}: forgotten"
        files = entry.get("files", {})
        for output in entry.get("outputs", {}):
            yield from (
                f"{path}: left, not made by this run"
                for path in _delete(folder / output, files.get(output))
            )
        for working in (*stages[name].goes_on_from, *stages[name].scratch):
            if working not in entry.get("outputs", {}):
                artifacts.remove(folder / working)


def _delete(path: Path, files: Mapping[str, str] | None) -> list[Path]:
    """Deletes an output file, or a stage's files in a folder. Returns files that remain."""
    if path.is_file() or path.is_symlink() or not mirrors.exists(path):
        artifacts.remove(path)
        return []
    for name in (*files, artifacts.CARD) if files else ():  # the card is not in the record
        artifacts.remove(path / name)
    left = [file for file in mirrors.below(path) if not file.exists()]
    for each in sorted(path.rglob("*"), reverse=True):
        if each.is_dir() and not each.is_symlink() and not any(each.iterdir()):
            each.rmdir()
        elif not each.is_dir():
            left.append(each)
    if not left and path.exists():
        path.rmdir()
    return left


def _entries(folder: Path) -> dict[str, Any]:
    """Reads the stages' entries of stage.json, without checking whether they were edited."""
    file = folder / "stage.json"
    return read_object(file) if file.exists() else {}
