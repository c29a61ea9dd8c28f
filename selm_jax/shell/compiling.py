"""Tells whether XLA is compiling a program, and how long JAX has spent on building programs."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from selm_jax.shell.pace import here

_BEGINS = "/jax/compilation_cache/compile_requests_use_cache"
_ENDS = "/jax/core/compile/backend_compile_duration"
_BUILDING = (
    "/jax/core/compile/jaxpr_trace_duration",
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    _ENDS,
)
_LONG = 1.0  # seconds of compiling that are worth a line

_say: Callable[[str], None] | None = None
_since: float | None = None
_spans: list[tuple[float, float]] | None = None  # of building programs, none within another


def spent() -> float:
    """Seconds that this process has spent on tracing, lowering and compiling programs.

    Counting starts at the first call.
    """
    global _spans
    if _spans is None:
        import jax  # here, because the command line shows its help without it

        _spans = []
        jax.monitoring.register_event_time_span_listener(_built)
    return sum(end - start for start, end in _spans)


def _built(event: str, start_time: float, end_time: float, **_: Any) -> None:
    """Notes a span that has ended, in place of those within it, such as of inner functions."""
    if event not in _BUILDING or _spans is None:
        return
    while _spans and _spans[-1][0] >= start_time:
        _spans.pop()
    _spans.append((start_time, end_time))


def watch(say: Callable[[str], None]) -> None:
    """Starts listening to JAX's events when it is first called; later calls only replace `say`.

    A program's compilation begins with its look-up in the compilation cache.

    Args:
      say: takes a line for each program that took long to compile.
    """
    global _say
    if _say is None:
        import jax  # here, because the command line shows its help without it

        jax.monitoring.register_event_listener(_begins)
        jax.monitoring.register_event_duration_secs_listener(_ends)
    _say = say


def seconds() -> float | None:
    """How long XLA has been compiling the current program; None if it is not compiling."""
    return None if _since is None else time.monotonic() - _since


def _begins(event: str, **_: Any) -> None:
    global _since
    if event == _BEGINS:
        _since = time.monotonic()
        here.sign()


def _ends(event: str, duration_secs: float, **about: Any) -> None:
    global _since
    if event == _ENDS:
        _since = None
        here.sign()
        if _say is not None and duration_secs >= _LONG:
            _say(f"compiled {about.get('fun_name', 'a program')} in {duration_secs:.1f} s")
