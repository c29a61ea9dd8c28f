"""A store that is killed at a write, as the process that uses it would be."""

from __future__ import annotations

import threading

from selm_jax.shell.storage import Store


class Killed(Exception):
    pass


class Mortal:
    """A store whose process is killed before its n-th write; from then on it does nothing.

    Attributes:
      life: of the process: what its stores share.
    """

    def __init__(self, inner: Store, n: float = float("inf"), life: Life | None = None):
        self.inner, self.life = inner, life or Life(n)

    @property
    def left(self) -> float:
        return self.life.left

    @property
    def made(self) -> list[tuple[str, str]]:
        return self.life.made

    def __getattr__(self, name):
        if not callable(found := getattr(self.inner, name)):
            return found

        def ask(*arguments, **named):
            with self.life.turn:
                self.life.left -= name in ("put", "delete")
                if self.life.left <= 0:
                    raise Killed
                self.life.made.append((name, arguments[0] if arguments else ""))
                return found(*arguments, **named)

        return ask


class Life:
    """The life of a process that dies before its n-th write.

    Attributes:
      left: how many writes it has left.
      made: the names and keys of the requests that it has made.
    """

    def __init__(self, n: float = float("inf")):
        self.left, self.made, self.turn = n, [], threading.Lock()
