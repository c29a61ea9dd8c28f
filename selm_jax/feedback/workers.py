"""A ranker that calls a user's function in separate processes, with a time limit per call.

Separate processes are the default because only a process can be stopped: a function that hangs,
crashes or exhausts memory then causes an error that names the prompt, and does not take the whole
run down. Processes are spawned, not forked: JAX runs threads, and a fork copies their locks but not
the threads. `workers: 0` calls the function in this process, if it needs this process's devices or
state.
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
from selm_jax.shell.pace import here
from selm_jax.shell.ranges import Count, Natural, Positive
from selm_jax.shell.user_code import UserCodeError, function_at

_START_SECONDS = 120.0  # for a process to start and import the function
_TIMEOUT = 60.0
_BATCH = 64


@dataclass(frozen=True)
class Call:
    """The arguments of one call of the user's function, and the responses that it scores.

    Attributes:
        arguments: the positional arguments.
        places: for each expected score, a description of the response, for errors.
        vectorised: whether the function returns a list of scores.
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
        """The first 60 characters of the (first) response, for errors."""
        response = self.arguments[1][0] if self.vectorised else self.arguments[1]
        return repr(response[:60])


@dataclass(frozen=True)
class FunctionRanker:
    """A ranker that calls a user's function. Build it with `user_function`.

    Attributes:
        name: `package.module:function`.
        function: the same function, imported in this process.
        workers: number of processes; 0 calls `function` in this process.
        timeout: seconds for one call; ignored with 0 workers.
        batch: maximum responses per call; None calls the function with one response, not lists.
    """

    name: str
    function: Callable[..., Any]
    workers: int
    timeout: float
    batch: int | None

    def scores(
        self, questions: Sequence[Question], candidates: Sequence[Sequence[str]]
    ) -> list[Float64[np.ndarray, " candidates"]]:
        """Scores the candidates: one float64 array per question; see `ranker.Ranker`.

        Raises:
            FeedbackError: the function raised, took too long, died, or did not return a finite
                number; the message names the function, the prompt's ID and the candidate's index.
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
        # Every call gets its own copy of the row: changes to it do not affect the next candidate.
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
    """Makes a ranker that calls a user's function.

    Args:
        path: `package.module:function`, importable from `sys.path`. The function is
            `(prompt: str, response: str, row: dict) -> float`, or, vectorised,
            `(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]`.
        workers: number of processes that call it. JAX sees only the CPU there, since this process
            uses the accelerator. 0 calls the function in this process, without a time limit.
        timeout: seconds for one call; 60 by default.
        vectorised: whether the function takes lists.
        batch: maximum responses of one vectorised call, over all prompts; 64 by default.

    Raises:
        FeedbackError: the module cannot be imported, it has no such function, the function cannot
            be called with three arguments, or a setting is invalid.
    """
    where = f"ranker {path!r}"
    if workers == 0 and timeout is not None:
        raise FeedbackError(
            f"{where}: found timeout {timeout!r} with workers 0, but a call in this process cannot "
            "be stopped. Remove the timeout, or set workers to 1 or more."
        )
    seconds = _TIMEOUT if timeout is None else timeout
    if not isinstance(vectorised, bool) or (batch is not None and not vectorised):
        raise FeedbackError(
            f"{where}: found vectorised {vectorised!r} and batch {batch!r}; expected vectorised to "
            "be true or false, and a batch only if it is true."
        )
    size = _BATCH if batch is None else batch
    return FunctionRanker(path, load(path), workers, seconds, size if vectorised else None)


def load(path: str) -> Callable[..., Any]:
    """Imports the function at `package.module:function`.

    Raises:
        FeedbackError: there is no such function of the user's; see `user_function`.
    """
    try:
        return function_at(path, "prompt", "response", "row")
    except UserCodeError as error:
        raise FeedbackError(f"ranker {path!r}: {error}.") from error


def evaluate(function: Callable[..., Any], call: Call) -> list[float]:
    """Calls the user's function and checks the scores that it returns.

    Raises:
        FeedbackError: it raised, or did not return one finite number for each response.
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
            f"{call.where}: the rule returned {result!r}; expected a list with one number for each "
            f"of {len(call.places)} responses."
        )
    return [finite_number(v, place) for v, place in zip(values, call.places, strict=True)]


def in_processes(
    path: str, calls: Sequence[Call], workers: int, timeout: float
) -> list[list[float]]:
    """Runs `evaluate` for each call in at most `workers` processes; returns scores in call order.

    It leaves no process behind, and none that these started.

    Raises:
        FeedbackError: `evaluate` raised it, a call took longer than `timeout` seconds, or its
            process died.
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
                here.sign()
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
    """The parent's handle of a worker process. A ready process has sent its first answer."""

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
                f"({type(error).__name__}: {error}). Set workers: 0 to call the function here."
            ) from error
        self.deadline = time.monotonic() + timeout

    def has_answered(self) -> bool:
        """Returns whether the process has answered or ended, so that `answer` will not block.

        Raises:
            FeedbackError: it has not, and the time limit is over.
        """
        if self.connection.poll():
            return True
        if time.monotonic() < self.deadline:
            return False
        if self.call is None:
            raise FeedbackError(
                f"{self.started} did not start within {_START_SECONDS:g} s. Check what the rule's "
                "module does when it is imported."
            )
        raise FeedbackError(
            f"{self.call.where}: the rule took longer than {self.timeout:g} s (`timeout`) and was "
            f"stopped. Raise timeout, or make the rule faster. The response begins "
            f"{self.call.beginning}."
        )

    def answer(self) -> list[float]:
        try:
            reply = json.loads(self.connection.recv_bytes())  # JSON: nothing is unpickled
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
            return FeedbackError(
                f"{self.started} died when it started ({how}). Check what the rule's module does "
                "when it is imported."
            )
        return FeedbackError(
            f"{self.call.where}: the rule's process died ({how}; signal 9 often means that it ran "
            f"out of memory). The response begins {self.call.beginning}."
        )

    def kill(self) -> None:
        """Kills the process and all its descendants, including daemons (see `shell.processes`).

        If something else has killed the process, its daemons have moved to process 1 and survive.
        """
        assert self.process.pid is not None  # it was started
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGSTOP)  # so that it starts no more processes
        processes.kill_descendants(self.process.pid)
        with contextlib.suppress(ProcessLookupError):  # it has ended, or has no own group yet
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


def _serve(connection: multiprocessing.connection.Connection, path: str) -> None:
    """The main function of a worker process: reports that it is ready, then answers calls."""
    os.setsid()  # its own process group, so that it can be stopped with all its children
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
