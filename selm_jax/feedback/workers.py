"""A user's function as a ranker, in processes of its own with a limit of time for every call.

Processes are the default because only a process can be stopped: a rule that hangs, crashes or eats
all memory then costs one error that names the prompt, not the night's run. They are spawned, not
forked: JAX runs threads, and a fork copies their locks but not the threads. `workers: 0` calls the
function here, for one that shares this process's devices or state.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float64

from selm_jax.feedback.ranker import (
    FeedbackError,
    Question,
    check_questions,
    check_scores,
    finite_number,
    row_values,
)
from selm_jax.shell import processes
from selm_jax.shell.ranges import Count, Natural, Positive
from selm_jax.shell.user_code import UserCodeError, function_at

_START_SECONDS = 120.0  # for a process to start and import; no call's limit, but a limit
_TIMEOUT = 60.0
_BATCH = 64


@dataclass(frozen=True)
class Call:
    """One call of the function.

    Attributes:
        arguments: of the call.
        places: for each score that it is to give, what is judged, in words.
        vectorised: it is to give a list of scores.
    """

    arguments: tuple[Any, ...]
    places: tuple[str, ...]
    vectorised: bool

    @property
    def where(self) -> str:
        if len(self.places) == 1:
            return self.places[0]
        return f"{self.places[0]}, and {len(self.places) - 1} more"

    @property
    def beginning(self) -> str:
        """Of the (first) response."""
        response = self.arguments[1][0] if self.vectorised else self.arguments[1]
        return repr(response[:60])


@dataclass(frozen=True)
class FunctionRanker:
    """A user's function as a ranker. Build it with `user_function`.

    Attributes:
        name: `package.module:function`.
        function: the same, imported here.
        workers: processes; 0 calls `function` here.
        timeout: seconds for one call, in processes alone.
        batch: most responses of one call; None hands over one response, not lists.
    """

    name: str
    function: Callable[..., Any]
    workers: int
    timeout: float
    batch: int | None

    def scores(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> list[Float64[np.ndarray, " candidates"]]:
        """One float64 array `[candidates]` per question; see `ranker.Ranker`.

        Raises:
            FeedbackError: the function raised, took too long, died, or returned what is no finite
                number; names the function, the prompt's id and the candidate's index.
        """
        check_questions(self.name, questions, candidates)
        calls = list(self._calls(questions, candidates))
        if self.workers == 0:
            of_calls = [evaluate(self.function, call) for call in calls]
        else:
            of_calls = in_processes(self.name, calls, self.workers, self.timeout)
        values = iter([value for of_call in of_calls for value in of_call])
        rows = [[next(values) for _ in texts] for texts in candidates]
        return check_scores(self.name, questions, candidates, rows)

    def _calls(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> Iterator[Call]:
        # Every call gets a row of its own: a rule that adds to it cannot reach the next candidate.
        each = [
            (f"ranker {self.name!r}, prompt {question.id!r}, candidate {index}", question, text)
            for question, texts in zip(questions, candidates, strict=True)
            for index, text in enumerate(texts)
        ]
        if self.batch is None:
            for place, question, text in each:
                yield Call((question.prompt, text, question.own_row()), (place,), False)
            return
        for start in range(0, len(each), self.batch):
            places, asked, texts = zip(*each[start : start + self.batch], strict=True)
            arguments = ([q.prompt for q in asked], list(texts), [q.own_row() for q in asked])
            yield Call(arguments, places, True)


def user_function(
    path: str,
    /,
    workers: Natural = 1,
    timeout: Positive | None = None,
    vectorised: bool = False,
    batch: Count | None = None,
) -> FunctionRanker:
    """A user's function as a ranker.

    Args:
        path: `package.module:function`, importable from `sys.path`. The function is
            `(prompt: str, response: str, row: dict) -> float`, or, vectorised,
            `(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]`.
        workers: processes that call it; in them JAX sees the CPU alone, since the accelerator
            is this process's. 0 calls it here, without a limit of time.
        timeout: seconds for one call; 60 by default.
        vectorised: whether the function takes lists.
        batch: most responses of one vectorised call, over all prompts; 64 by default.

    Raises:
        FeedbackError: bad path, the module cannot be imported, it has no such function, the
            function cannot be called with three arguments, or a setting that cannot be.
    """
    where = f"ranker {path!r}"
    if workers == 0 and timeout is not None:
        raise FeedbackError(
            f"{where}: found timeout {timeout!r} with workers 0; a call in this process cannot be "
            "stopped. Take the timeout away, or set workers to 1 or more."
        )
    seconds = _TIMEOUT if timeout is None else timeout
    if not isinstance(vectorised, bool) or (batch is not None and not vectorised):
        raise FeedbackError(
            f"{where}: found vectorised {vectorised!r} and batch {batch!r}; expected true or "
            "false, and a batch only where it is true."
        )
    size = _BATCH if batch is None else batch
    return FunctionRanker(path, load(path), workers, seconds, size if vectorised else None)


def load(path: str) -> Callable[..., Any]:
    """The function at `package.module:function`.

    Raises:
        FeedbackError: as `user_function`.
    """
    try:
        return function_at(path, "prompt", "response", "row")
    except UserCodeError as error:
        raise FeedbackError(f"ranker {path!r}: {error}.") from error


def evaluate(function: Callable[..., Any], call: Call) -> list[float]:
    """The scores of one call, checked.

    Raises:
        FeedbackError: it raised, or returned anything but one finite number for each response.
    """
    try:
        result = function(*call.arguments)
    except Exception as error:
        raise FeedbackError(
            f"{call.where}: the rule raised {type(error).__name__}: {error}"
        ) from error
    values = row_values(result, len(call.places)) if call.vectorised else [result]
    if values is None:
        raise FeedbackError(
            f"{call.where}: the rule returned {result!r}; expected a list of one number for each "
            f"of {len(call.places)} responses."
        )
    return [finite_number(v, place) for v, place in zip(values, call.places, strict=True)]


def in_processes(
    path: str, calls: Sequence[Call], workers: int, timeout: float
) -> list[list[float]]:
    """`evaluate` for each call, in order, in at most `workers` processes.

    Raises:
        FeedbackError: as `evaluate`, or a call took longer than `timeout` seconds, or its process
            died. No process is left behind, nor any that it started.
    """
    found: list[list[float]] = [[]] * len(calls)
    todo = iter(range(len(calls)))
    pool: list[_Worker] = []
    try:
        pool.extend(_Worker(path) for _ in range(min(workers, len(calls))))
        busy = list(pool)
        while busy:
            left = min(worker.deadline for worker in busy) - time.monotonic()
            multiprocessing.connection.wait([w.connection for w in busy], max(left, 0))
            for worker in list(busy):
                if not worker.has_answered():
                    continue
                scores = worker.answer()
                if worker.call is not None:
                    found[worker.index] = scores
                index = next(todo, None)
                if index is None:
                    busy.remove(worker)
                else:
                    worker.give(index, calls[index], timeout)
    finally:
        for worker in pool:
            worker.kill()
    return found


class _Worker:
    """One process, seen from here. It starts at once, and is ready when it first answers."""

    def __init__(self, path: str):
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.index, self.call = -1, None
        self.started = f"ranker {path!r}: its process"
        self.deadline = time.monotonic() + _START_SECONDS
        self.process = context.Process(target=_serve, args=(theirs, path), name=f"rule {path}")
        self.process.start()
        theirs.close()

    def give(self, index: int, call: Call, timeout: float) -> None:
        self.index, self.call, self.timeout = index, call, timeout
        try:
            self.connection.send(call)
        except (BrokenPipeError, ConnectionResetError):
            raise self._died() from None
        except Exception as error:  # the row is the user's: pickling it can raise anything
            raise FeedbackError(
                f"{call.where}: the row cannot be sent to another process "
                f"({type(error).__name__}: {error}). With workers: 0 it need not be."
            ) from error
        self.deadline = time.monotonic() + timeout

    def has_answered(self) -> bool:
        """Whether `answer` has one, or an end of the process to tell of.

        Raises:
            FeedbackError: it has not, and its time is up.
        """
        if self.connection.poll():
            return True
        if time.monotonic() < self.deadline:
            return False
        if self.call is None:
            raise FeedbackError(f"{self.started} did not start within {_START_SECONDS:g} s.")
        raise FeedbackError(
            f"{self.call.where}: the rule took longer than {self.timeout:g} s (`timeout`) and was "
            f"stopped. The response begins {self.call.beginning}."
        )

    def answer(self) -> list[float]:
        try:
            reply = json.loads(self.connection.recv_bytes())  # numbers and text: nothing unpickled
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if "error" in reply:
            error = FeedbackError(reply["error"])
            if reply["trace"]:
                error.add_note(f"In the worker process:\n{reply['trace']}")
            raise error
        return reply["scores"]

    def _died(self) -> FeedbackError:
        self.process.join(5)
        code = self.process.exitcode
        how = f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"
        if self.call is None:
            return FeedbackError(f"{self.started} died when it started ({how}).")
        return FeedbackError(
            f"{self.call.where}: the rule's process died ({how}; signal 9 is often the want of "
            f"memory). The response begins {self.call.beginning}."
        )

    def kill(self) -> None:
        """Ends the process and all it started, daemons too (see `processes`).

        Those of a process that something else has killed are process 1's by then, and not found.
        """
        assert self.process.pid is not None  # it was started
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGSTOP)  # so that it starts no more of them
        processes.kill_descendants(self.process.pid)
        with contextlib.suppress(ProcessLookupError):  # it is gone, or has no group of its own yet
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: multiprocessing.connection.Connection, path: str) -> None:
    """What a worker process does: says `ready`, then answers calls until it is stopped."""
    os.setsid()  # a group of its own, so that it can be stopped with all that it starts
    processes.adopt()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["JAX_PLATFORMS"] = "cpu"
    if "jax" in sys.modules:  # the main module imported it before this line
        sys.modules["jax"].config.update("jax_platforms", "cpu")
    try:
        function = load(path)
    except FeedbackError as error:
        _reply_error(connection, error)
        return
    _reply(connection, {"scores": []})
    while True:
        try:
            call = connection.recv()
        except EOFError:
            return
        try:
            scores = evaluate(function, call)
        except FeedbackError as error:
            _reply_error(connection, error)
        else:
            _reply(connection, {"scores": scores})


def _reply(connection: multiprocessing.connection.Connection, value: dict[str, Any]) -> None:
    connection.send_bytes(json.dumps(value).encode())


def _reply_error(connection: multiprocessing.connection.Connection, error: FeedbackError) -> None:
    cause = error.__cause__
    trace = "".join(traceback.format_exception(cause)) if cause else ""
    _reply(connection, {"error": str(error), "trace": trace})


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        processes.kill_descendants(os.getpid())
        os.killpg(0, signal.SIGKILL)
