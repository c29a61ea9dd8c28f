"""Settings of each iteration's evaluation, and of the lm-eval tasks of its capability guard."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict
from pydantic.dataclasses import dataclass

from selm_jax.config.kinds import All, Flag, Folder, agree, refuse
from selm_jax.shell.ranges import Range


def _one_or_several(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _well_written(names: tuple[str, ...]) -> tuple[str, ...]:
    refuse(
        [
            f"{number}: {name!r}; the name of one task was expected, as NAME or NAME:SHOTS"
            for number, name in enumerate(names)
            if not name.strip() or "," in name
        ]
    )
    return names


Tasks = Annotated[tuple[str, ...], BeforeValidator(_one_or_several), AfterValidator(_well_written)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Evaluation:
    # Number of answers sampled per held-out prompt, at temperature 1, to estimate reward and KL.
    samples: Annotated[int, Range(1, 4096, whole=True)] = 1
    # Tasks of lm-eval, or groups of them, that each iteration measures, as NAME or NAME:SHOTS, such
    # as [arc_easy, mmlu:5]; they need data.heldout and the extra `lm-eval` (docs/evaluate.md).
    tasks: Tasks = ()
    # Maximum number of rows of each task, from its start; null uses all.
    task_limit: All | None = None
    # Folder with task files (YAML) of your own. Python code that they name runs, so name no folder
    # that you do not trust.
    task_folder: Folder | None = None
    # Whether the tasks use the chat template, with shots as earlier turns, or plain text.
    task_chat: Flag = True

    @agree
    def _agrees(self) -> Iterator[str]:
        for key in ("task_limit", "task_folder", "task_chat"):
            if not self.tasks and getattr(self, key) != getattr(Evaluation, key):
                yield f"{key}: it has no effect without evaluation.tasks"
