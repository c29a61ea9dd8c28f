"""Decides which stages a command runs: all unfinished stages, or a single one."""

from __future__ import annotations

from typing import Literal

Do = Literal["do", "check", "leave"]


class Wanted:
    """The stages that a command runs: all stages, or only one.

    If only one is wanted, the stages before it are checked: their inputs must not have changed, or
    two states of the data would mix. The stages after it are left alone.
    """

    def __init__(self, stage: str | None = None, t: int = 0):
        self.stage, self.t = stage, t
        self.did: dict[tuple[str, int], bool] = {}

    def says(self, stage: str, t: int) -> Do:
        """Says what to do with a stage: run it, only check it, or leave it alone."""
        if self.stage is None or (stage, t) == (self.stage, self.t):
            return "do"
        return "leave" if (self.stage, self.t) in self.did else "check"

    def note(self, stage: str, t: int, worked: bool) -> None:
        """Records that a stage is done, and whether it had work to do."""
        self.did[stage, t] = worked

    @property
    def worked(self) -> bool:
        return any(self.did.values())
