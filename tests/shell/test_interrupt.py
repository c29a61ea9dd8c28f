"""Ctrl-C is never lost, and the second one ends at once."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import weakref

import jax
import pytest

from selm_jax.parallel import multihost
from selm_jax.shell import interrupt


def press():
    os.kill(os.getpid(), signal.SIGINT)


def in_a_garbage_collection():
    def callback(phase, info):
        gc.callbacks.remove(callback)
        press()
        sum(range(100))  # Python handles the signal before the callback ends

    gc.callbacks.append(callback)
    gc.collect()


def in_a_destructor():
    class Pressed:
        def __del__(self):
            press()
            sum(range(100))

    Pressed()


def in_a_callback_of_a_dead_object():
    class Thing:
        pass

    def callback(ref):
        press()
        sum(range(100))

    thing = Thing()
    ref = weakref.ref(thing, callback)
    del thing
    return ref


def in_the_garbage_collection_of_jax():
    """Where it was lost: JAX's own callback, in which it calls its compiled half."""
    jax.numpy.zeros(3)
    (callback,) = [each for each in gc.callbacks if each.__name__ == "_xla_gc_callback"]
    compiled = callback.__globals__["_jax"]

    def collect(*_):
        patch.undo()
        press()
        sum(range(100))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled, "collect_garbage", collect)
        gc.collect()


def where_it_is_swallowed():
    with contextlib.suppress(BaseException):
        press()
        sum(range(100))


def twice_in_garbage_collections():
    """The one that is raised again is lost, too."""
    in_a_garbage_collection()
    again = signal.getsignal(signal.SIGINT)

    def callback(phase, info):
        gc.callbacks.remove(callback)
        threading.Event().wait(0.5)  # until it is raised again, in here

    gc.callbacks.append(callback)
    gc.collect()
    return again


@pytest.mark.parametrize("after", [0.0, 0.7])
def test_who_handles_it_is_left_in_peace(after):
    """An orderly end takes its time, and is not interrupted by the same Ctrl-C."""
    steps = []
    with pytest.raises(KeyboardInterrupt), interrupt.heard():
        try:
            press()
            sum(range(100))
        finally:
            try:
                raise OSError  # what it does meanwhile may fail and be handled
            except OSError:
                threading.Event().wait(after)
            threading.Event().wait(after)
            steps.append("saved")
    assert steps == ["saved"]


@pytest.mark.parametrize(
    "place",
    [
        in_the_garbage_collection_of_jax,
        where_it_is_swallowed,
        twice_in_garbage_collections,
        in_a_garbage_collection,
        in_a_destructor,
        in_a_callback_of_a_dead_object,
    ],
)
def test_one_that_python_ignores_is_raised_a_moment_later(place, capsys):
    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    with pytest.raises(KeyboardInterrupt), interrupt.heard():
        kept = place()
        assert interrupt.asked()
        threading.Event().wait(30)  # it does not come to that
        del kept
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before
    assert not interrupt.asked() and not capsys.readouterr().err


def test_it_raises_at_once_but_where_it_is_deferred(capfd):
    with interrupt.heard(), pytest.raises(KeyboardInterrupt):
        press()
    with interrupt.heard():
        with multihost.stop_deferred():
            press()
            assert multihost.should_stop()
            assert isinstance(multihost.stopped(), KeyboardInterrupt)
        with pytest.raises(KeyboardInterrupt):
            multihost.stop_if_told()
    assert "Ctrl-C again kills the program" in capfd.readouterr().err
    assert not multihost.should_stop() and isinstance(multihost.stopped(), multihost.Stopped)


def test_in_one_of_several_processes_it_is_not_deferred(monkeypatch):
    """The others do not hear of it, and would wait for this one."""
    monkeypatch.setattr(multihost, "count", lambda: 2)
    with interrupt.heard():
        with multihost.stop_deferred(), pytest.raises(KeyboardInterrupt):
            press()
        with pytest.raises(KeyboardInterrupt):
            multihost.should_stop()


def test_the_second_one_ends_a_process_that_does_not_listen():
    program = """
import os, signal
from selm_jax.shell import interrupt
signal.signal(signal.SIGINT, signal.default_int_handler)
with interrupt.heard(), interrupt.deferred():
    for press in range(3):
        os.kill(os.getpid(), signal.SIGINT)
        print(press, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (-signal.SIGINT, "0\n")
