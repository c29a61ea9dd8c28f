"""Chooses the slots and prefill rows of a policy's answers, and fewer after memory has run out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Any, TypeVar

import jax

from selm_jax.parallel import multihost
from selm_jax.policy import sizes
from selm_jax.policy.sizes import LEAST, BatchSizes, Generation, Room
from selm_jax.shell.memory import until_it_fits
from selm_jax.shell.progress import Advance
from selm_jax.shell.words import sizes_in_words

T = TypeVar("T")
_WORDS = {"slots": "slots", "prefill_rows": "prefill rows"}


class Fitting:
    """Does work with sizes that fit into memory; numbers that the user gave are not changed."""

    def __init__(self, name: str, fixed: dict[str, Any], say: Callable[[str], None]):
        """Stores what is given.

        Args:
          name: the model's name, for messages.
          fixed: the slots and the prefill rows that the user gave.
          say: tells the user which sizes were chosen, and what was given up.
        """
        self.name, self._fixed, self._say = name, fixed, say
        self._said = ""
        self._most: dict[str, int] = {}  # after memory has run out

    @cached_property
    def _room(self) -> Room:
        """The least memory of a device of all processes, as it was at the first choice."""
        device = jax.local_devices()[0]
        rooms = multihost.on_every(lambda: dataclasses.asdict(sizes.room(device)))
        return Room(**min(rooms, key=lambda room: room["bytes"]))

    def do(
        self,
        work: Callable[[BatchSizes, Advance], T],
        needs: Callable[[], Generation],
        progress: Advance,
    ) -> T:
        """Does the work; once more with fewer slots or prefill rows whenever memory runs out.

        Args:
          work: gets the sizes, and a function to tell its progress to.
          needs: the facts that the sizes depend on.
          progress: called as `work` does; what failed is taken back by negative numbers.
        """
        if self._fixed.keys() == _WORDS.keys():
            return work(dataclasses.replace(LEAST, **self._fixed), progress)
        facts, done = needs(), [0, 0]

        def told(answers: int, tokens: int = 0) -> None:
            done[0], done[1] = done[0] + answers, done[1] + tokens
            progress(answers, tokens)

        def lower(error: Exception) -> None:
            less = self._less(facts)
            # Of several processes, only this one may have run out of memory.
            if less is None or multihost.count() > 1:
                raise error
            told(-done[0], -done[1])
            self._most = {name: getattr(less, name) for name in _WORDS}
            self._say(f"{self.name}: memory ran out, so fewer answers are drawn together now")

        return until_it_fits(lambda: work(self._chosen(facts), told), lower)

    def _chosen(self, facts: Generation) -> BatchSizes:
        platform = jax.local_devices()[0].platform
        found = sizes.choose(facts, None, self._room.bytes, platform, self._fixed)
        lower = {name: min(getattr(found, name), most) for name, most in self._most.items()}
        found = dataclasses.replace(found, **lower)
        chosen = {word: getattr(found, n) for n, word in _WORDS.items() if n not in self._fixed}
        if not self._said and self._room.note:
            self._say(self._room.note)
        if (told := sizes_in_words(chosen, f"{facts.told}, {self._room.source}")) != self._said:
            self._say(f"{self.name}: {told}")
            self._said = told
        return found

    def _less(self, facts: Generation) -> BatchSizes | None:
        chosen, floors = self._chosen(facts), dict.fromkeys(_WORDS, facts.copies)
        return sizes.smaller(chosen, facts.needs(chosen), self._fixed, floors)
