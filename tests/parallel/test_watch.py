"""A process that is stuck does not keep the others waiting for ever, and one that works does."""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import forked
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selm_jax.parallel import watch
from selm_jax.parallel.cluster import MultihostError, patience
from selm_jax.parallel.watch import Sign, Watch, sign_of
from selm_jax.shell.pace import Pace

TWO = Path(__file__).with_name("two.py")


def sign(signs=1, *, steps=1, waits=False, patience=5.0, at="train.py:1", done=False) -> Sign:
    return Sign("a", "iteration 1, train", signs, steps, waits, patience, at, done=done)


def seen(*looks: dict[int, Sign], suspended: tuple[int, ...] = ()) -> list[int]:
    """What a watch says after the last of these looks, a second after one another."""
    w, late = Watch(1.0), []
    for beat, look in enumerate(looks):
        beats = {p: 0 if p in suspended else beat for p in look}
        late = w.look({p: dataclasses.replace(sign, beat=beats[p]) for p, sign in look.items()})
    return late


# --- who is late ----------------------------------------------------------------------------------


def test_the_process_that_holds_up_the_others_is_late_not_those_that_wait_for_it():
    stuck = {0: sign(9, waits=True), 1: sign(4), 2: sign(9, waits=True)}
    assert seen(*[stuck] * 6) == []  # silent for five seconds, which it may be
    assert seen(*[stuck] * 7) == [1]


def test_a_process_that_gives_signs_is_waited_for_however_long_it_takes():
    assert seen(*[{0: sign(1, waits=True), 1: sign(n)} for n in range(1000)]) == []


def test_each_process_is_given_the_time_that_it_asks_for():
    slow = {0: sign(waits=True), 1: sign(patience=50.0)}
    assert seen(*[slow] * 50) == [] and seen(*[slow] * 52) == [1]


def test_moving_about_without_a_sign_is_no_progress():
    looks = [{0: sign(waits=True), 1: sign(at=f"loop.py:{n}")} for n in range(7)]
    assert seen(*looks) == [1]


def test_of_several_silent_processes_those_that_came_least_far_are_late():
    """All but one wait in a program on the devices, which does not say that it waits."""
    inside = {p: sign(steps=7 if p != 2 else 6) for p in range(4)}
    assert seen(*[inside] * 7) == [2]
    assert seen(*[dict.fromkeys(range(3), sign())] * 7) == [0, 1, 2]  # nobody can tell


def test_a_process_may_wait_in_a_program_on_the_devices_for_one_that_still_works():
    """It loads its part of the model, and the other one downloads the files for an hour."""
    inside = sign(steps=3)
    looks = [{0: inside, 1: sign(n, steps=2)} for n in range(50)]
    assert seen(*looks) == []
    both = {0: inside, 1: sign(49, steps=2)}
    assert seen(*looks, *[both] * 7) == [1]  # then it no longer works
    assert seen(*[{0: inside, 1: sign(n, steps=4)} for n in range(50)]) == [0]


def test_a_process_that_has_finished_holds_up_nobody():
    """It posts nothing any more, and must not be taken for one that was suspended."""
    last = {0: sign(4), 1: sign(9, done=True), 2: sign(9, waits=True)}
    assert seen(*[last] * 7, suspended=(1,)) == [0]
    assert seen(*[{0: sign(n), 1: sign(9, done=True)} for n in range(50)], suspended=(1,)) == []


def test_a_suspended_process_is_late_even_if_it_was_waiting_when_it_was_suspended():
    """The other one is in a program on the devices of both, which does not say that it waits."""
    assert seen(*[{0: sign(), 1: sign(waits=True)}] * 7, suspended=(1,)) == [1]
    assert seen(*[{0: sign(n), 1: sign(waits=True)} for n in range(50)], suspended=(1,)) == []
    assert seen(*[{0: sign(waits=True), 1: sign(waits=True)}] * 7, suspended=(1,)) == [1]


def test_processes_that_all_wait_for_each_other_do_not_wait_for_ever():
    around = {0: sign(waits=True, steps=3), 1: sign(waits=True, steps=4)}
    assert seen(*[around] * 7) == [0]


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), max_size=30), st.integers(1, 9))
def test_late_is_who_was_silent_for_longer_than_the_limit(moves, limit):
    """Against the obvious account of it: the looks since the last sign, for each process."""
    w, signs, silent = Watch(1.0), [0, 0, 0], [-1, -1, -1]
    for beat, move in enumerate(moves):
        for p, moved in enumerate(move):
            signs[p] += moved
            silent[p] = 0 if moved or silent[p] < 0 else silent[p] + 1
        now = {p: sign(signs[p], patience=limit) for p in range(3)}
        late = w.look({p: dataclasses.replace(s, beat=beat) for p, s in now.items()})
        over = [p for p in range(3) if silent[p] > limit]
        # All have come equally far, so one that still works may be what the others wait for.
        assert late == (over if len(over) == 3 else [])


# --- how long is too long -------------------------------------------------------------------------


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


def spend(pace: Pace, clock: Clock, *seconds: float) -> None:
    for each in seconds:
        clock.now += each
        pace.sign()


def test_the_limit_follows_the_pace_of_the_stage(clock):
    pace = Pace(clock)
    assert sign_of(pace, 60).patience == 60
    spend(pace, clock, 5, 7, 6)
    assert sign_of(pace, 60).patience == 70
    pace.enter("iteration 1, export")
    assert sign_of(pace, 60).patience == 60
    spend(pace, clock, 600, *[8] * 50)  # it compiled once
    assert sign_of(pace, 60).patience == 80


def test_waiting_for_others_is_not_the_own_pace(clock):
    pace = Pace(clock)
    spend(pace, clock, 3)
    with pace.waiting():
        assert sign_of(pace, 1).waits
        clock.now += 1e6
    spend(pace, clock, 2)
    told = sign_of(pace, 1)
    assert not told.waits and told.patience == 30


def test_a_sign_says_where_the_main_thread_is():
    told = sign_of(Pace(), 1)
    assert told.host == socket.gethostname()
    assert re.fullmatch(r"[\w./]+\.py:\d+", told.at)


@pytest.mark.parametrize("told", ["", "0", "-3", "half an hour", "nan", "inf"])
def test_a_patience_that_is_no_time_is_refused(told):
    assert patience({}) == watch.PATIENCE and patience({"SELM_PATIENCE": "90"}) == 90
    with pytest.raises(MultihostError, match="SELM_PATIENCE=.*expected the seconds"):
        patience({"SELM_PATIENCE": told})


# --- two real processes ---------------------------------------------------------------------------


@pytest.fixture
def two():
    """Starts both processes; returns them when they have met."""
    started: list[subprocess.Popen[str]] = []

    def start(how: str) -> list[subprocess.Popen[str]]:
        address = f"127.0.0.1:{forked.free_port()}"
        for i in range(2):
            own = {
                "SELM_COORDINATOR": address, "SELM_PROCESSES": "2", "SELM_PROCESS": str(i),
                "SELM_PATIENCE": "1.5", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            }  # fmt: skip
            started.append(
                subprocess.Popen(
                    [sys.executable, str(TWO), how], env=os.environ | own, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                )
            )  # fmt: skip
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "met\n", process.communicate()
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_slow_process_that_works_is_waited_for(two):
    told = [process.communicate(timeout=60) for process in two("works")]
    assert told == [("done\n", "")] * 2


@pytest.mark.parametrize(
    "stopped", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["hangs", "suspended"]
)
def test_a_stuck_process_ends_the_run_with_the_status_that_starts_it_again(two, stopped):
    first, second = two("hangs")
    if stopped:
        second.send_signal(signal.SIGSTOP)
    _, told = first.communicate(timeout=60)
    assert first.returncode == watch.STATUS == 76, told
    late = f"process 1 on host {socket.gethostname()} ("
    # A process that is suspended has told its place up to one look ago.
    assert late + ("" if stopped else "iteration 1, train, two.py:") in told
    assert "no progress for" in told and "Start all processes again" in told
    assert "process 0 on host" in told.partition("so ")[2], "who waits no longer"
    if not stopped:  # it names itself, unless jax has ended it since process 0 is gone
        second.communicate(timeout=60)
        assert second.returncode in (76, -signal.SIGABRT)
