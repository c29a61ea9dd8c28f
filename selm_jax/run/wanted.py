"""Which stages a command asks for: all that are left, or one alone."""

from __future__ import annotations

from typing import Literal

Do = Literal["do", "check", "leave"]


class Wanted:
    """All stages, or one.

    One alone is reached the way that all are: those before it are looked at, for what they are now
    given is what they were done with, or two states of the data would mix; those after it are left.
    """

    def __init__(self, stage: str | None = None, t: int = 0):
        self.stage, self.t = stage, t
        self.did: dict[tuple[str, int], bool] = {}

    def says(self, stage: str, t: int) -> Do:
        """What to do with a stage, to which the run has come."""
        if self.stage is None or (stage, t) == (self.stage, self.t):
            return "do"
        return "leave" if (self.stage, self.t) in self.did else "check"

    def note(self, stage: str, t: int, worked: bool) -> None:
        """Notes that a stage is done, and whether there was work to do."""
        self.did[stage, t] = worked

    @property
    def worked(self) -> bool:
        return any(self.did.values())
