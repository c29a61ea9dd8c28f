"""A store that is killed at a write, as the process that uses it would be."""

from __future__ import annotations

import threading

from selm_jax.shell.storage import Store


class Killed(Exception):
    pass


class Mortal:
    """A store whose process is killed before its n-th write; from then on it does nothing.

    Attributes:
      made: the names and keys of the requests that it has made.
    """

    def __init__(self, inner: Store, n: float = float("inf")):
        self.inner, self.left, self.made, self.turn = inner, n, [], threading.Lock()

    def __getattr__(self, name):
        def ask(*arguments, **named):
            with self.turn:
                self.left -= name in ("put", "delete")
                if self.left <= 0:
                    raise Killed
                self.made.append((name, arguments[0] if arguments else ""))
                return getattr(self.inner, name)(*arguments, **named)

        return ask
