"""Ends a run whose process is stuck, so that the other processes do not wait for it for ever.

jax notices within two minutes that a process has died or that its host is gone. It does not notice
a process that lives and does nothing: one that hangs in a file system, in a lock, or in a device.
So each process posts how its work goes on (`Sign`), and a thread of each reads what all have
posted. If nothing new comes from a process for longer than the pace of its stage explains, the
thread names it and ends its own process, even if that waits inside a device's program.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from selm_jax.shell.pace import Pace
from selm_jax.shell.words import duration

STATUS = 76  # of a process whose other processes are gone; see `commands.ending`
PATIENCE = 1800.0  # seconds; a checkpoint of 96 GB takes 7 minutes, a large program longer
_TIMES = 10  # a piece of work may take this many times as long as the slowest one before
_LOOKS = 20  # at least so often the others are looked at before one of them counts as stuck
_MUTE = 3  # looks at which a process had not posted again, though it posts as often as it looks
_OFTEN = 10.0  # seconds between two looks at most
_PACKAGE = Path(__file__).parents[1]


@dataclasses.dataclass(frozen=True)
class Sign:
    """Holds what a process tells the others about its work.

    Attributes:
      host: the name of its machine.
      stage: what it is doing.
      signs: increases whenever it has done a piece of its work.
      steps: how many points it has passed that all processes pass in the same order.
      waits: whether it waits for other processes.
      patience: the seconds for which the others should wait for its next sign.
      done: whether it has finished all its work.
      at: the line of code that its main thread is at.
      beat: how often it has posted: it lives as long as this number grows, even if it is stuck.
    """

    host: str
    stage: str
    signs: int
    steps: int
    waits: bool
    patience: float
    done: bool = dataclasses.field(compare=False, default=False, kw_only=True)
    at: str = dataclasses.field(compare=False)  # a loop without progress changes it, too
    beat: int = dataclasses.field(compare=False, default=0)


def sign_of(pace: Pace, least: float, beat: int = 0) -> Sign:
    """Returns what this process has to tell about its work now.

    Args:
      least: the seconds that any piece of work may take.
      beat: how often it has told so before.
    """
    return Sign(
        host=socket.gethostname(),
        stage=pace.stage,
        signs=pace.signs,
        steps=pace.steps,
        waits=pace.waits,
        patience=max(least, _TIMES * pace.longest),
        at=_line(),
        beat=beat,
    )


def _line() -> str:
    """The line of this package that the main thread is at, such as `training/loop.py:137`."""
    frame = sys._current_frames()[threading.main_thread().ident or 0]
    line = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(_PACKAGE) and file.parent.name != "parallel":
            return f"{file.relative_to(_PACKAGE)}:{frame.f_lineno}"
        frame = frame.f_back
    return line  # this package has not called it


class Watch:
    """Looks at the signs of all processes again and again, and finds those that are stuck.

    Time is counted in looks: if the machine that looks was suspended, that time does not count.

    Args:
      every: the seconds between two looks.
    """

    def __init__(self, every: float):
        self.every = every
        self._seen: dict[int, Sign] = {}
        self._looks: dict[int, int] = {}  # since the last sign
        self._beatless: dict[int, int] = {}  # looks since the last beat

    def silence(self, process: int) -> float:
        """The seconds since this process last gave a sign."""
        return self._looks[process] * self.every

    def look(self, signs: Mapping[int, Sign]) -> list[int]:
        """The processes that hold up the run: silent for too long, though they wait for nobody.

        Several can be silent, because a program on the devices does not say that it waits. Then
        those that do not even post hold up the run, even if the last that they posted was that they
        wait, and otherwise those that have come least far. A process that has come as far as one
        that still works may be waiting for it in such a program, so it is not late yet.
        """
        signs = {process: sign for process, sign in signs.items() if not sign.done}
        for process, sign in signs.items():
            before = self._seen.get(process)
            same, still = before == sign, before is not None and before.beat == sign.beat
            self._looks[process] = self._looks.get(process, 0) + 1 if same else 0
            self._beatless[process] = self._beatless.get(process, 0) + 1 if still else 0
        self._seen = dict(signs)
        silent = [p for p, sign in signs.items() if self.silence(p) > sign.patience]
        late = [p for p in silent if not signs[p].waits]
        works = [sign.steps for p, sign in signs.items() if p not in silent and not sign.waits]
        if works:
            late = [p for p in late if signs[p].steps < min(works)]
        if len(silent) == len(signs):
            late = late or silent
        mute = [p for p in signs if self._beatless[p] >= _MUTE]
        if late and mute:
            return mute
        return [p for p in late if signs[p].steps == min(signs[q].steps for q in late)]


def story(signs: Mapping[int, Sign], late: list[int], silence: float, me: int) -> str:
    """Says which processes are late, where they are, and what to do."""
    who = "; ".join(
        f"process {p} on host {signs[p].host} ({signs[p].stage}, {signs[p].at})" for p in late
    )
    which = " One of them holds up the others." if len(late) > 1 else ""
    return (
        f"no progress for {duration(silence)}: {who}.{which} At the pace of this stage "
        f"{duration(max(signs[p].patience for p in late))} are enough for a piece of work, so "
        f"process {me} on host {signs[me].host} waits no longer and ends with status {STATUS}. "
        "What was saved is complete. Start all processes again: the same command continues. If the "
        "host was only slow, set SELM_PATIENCE to more seconds"
    )


def begin(
    pace: Pace,
    me: int,
    *,
    least: float,
    post: Callable[[dict[str, Any]], None],
    read: Callable[[], Mapping[int, dict[str, Any]]],
    end: Callable[[str], None] | None = None,
) -> Callable[[], None]:
    """Starts the thread that posts this process's signs and watches those of all processes.

    Args:
      pace: the signs of this process.
      me: its number.
      least: the seconds that any piece of work may take.
      post: stores what this process tells, as JSON, where `read` of every process finds it.
      read: what the processes have posted, by their numbers.
      end: what to do if a process is late, given a message; by default this process ends.

    Returns:
      A function that ends the watch, and tells the others that this process has finished its work.
    """
    watch, ended = Watch(min(_OFTEN, least / _LOOKS)), threading.Event()
    beats = itertools.count()

    def look() -> None:
        post(dataclasses.asdict(sign_of(pace, least, next(beats))))
        signs = {process: Sign(**told) for process, told in read().items()}
        late = watch.look(signs)
        if late and not ended.is_set():
            (end or _end)(story(signs, late, max(map(watch.silence, late)), me))

    def run() -> None:
        # A coordinator that does not answer is jax's business: it ends this process.
        while not ended.wait(watch.every):
            with contextlib.suppress(RuntimeError):
                look()

    thread = threading.Thread(target=run, daemon=True, name="watch")

    def stop() -> None:
        ended.set()
        thread.join(_OFTEN)  # or its last look could be posted after the line below
        with contextlib.suppress(RuntimeError):
            post(dataclasses.asdict(sign_of(pace, least)) | {"done": True})

    look()
    thread.start()
    return stop


def _end(message: str) -> None:
    print(f"selm: {message}", file=sys.stderr, flush=True)
    os._exit(STATUS)
