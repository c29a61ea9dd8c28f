"""Coordinates the several processes of one run: they find each other and agree on small values.

Every process runs the same stages in the same order; arrays are sharded over the devices of all.
Work that only one process may do (write a file, check whether one exists, ask a judge) is done by
the first, which sends the result to the others: `on_first`. This uses the coordinator of
`jax.distributed`, not the devices, so that a process may wait for hours while another one ranks.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
from jax._src import distributed  # its client has no public name; orbax uses it too
from jax.experimental import multihost_utils

from selm_jax.parallel import watch
from selm_jax.parallel.cluster import MultihostError, found, patience
from selm_jax.shell import interrupt
from selm_jax.shell.pace import here

T = TypeVar("T")

_SLICES = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
_WATCHED = 10**9  # milliseconds: it is the watch that limits how long a process waits
_numbers = itertools.count()  # equal in all processes, because all make the same calls in order
_boundaries = itertools.count()
_told_to_stop = threading.Event()
_deferred = False


class Stopped(SystemExit):
    """The run was told to stop (SIGTERM, preemption) and has saved its state.

    The process exits with status 75, EX_TEMPFAIL of sysexits.h: try again.
    """

    def __init__(self):
        super().__init__(75)


# --- finding each other ---------------------------------------------------------------------------


def initialize() -> None:
    """Connects this process to the others of the run, if any. Call it before anything else of jax.

    On TPU pods, under SLURM and under Open MPI jax finds the other processes itself. Elsewhere set
    the environment variables SELM_COORDINATOR=host:port (of process 0), SELM_PROCESSES and
    SELM_PROCESS.

    Raises:
      MultihostError: if these variables or SELM_PATIENCE are incomplete or invalid, or if a service
        that knows the processes, such as a TPU's metadata server, does not answer.
    """
    least = patience(os.environ)
    with _unasked():
        arguments = found(os.environ)
        if arguments is None:
            return
        # For CPU devices: gloo is the only implementation that works between processes.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(**arguments)
    _watch(least)


def _watch(least: float) -> None:
    """Starts to watch the other processes, and to let them watch this one."""
    client, me = distributed.global_state.client, distributed.global_state.process_id
    assert client is not None

    def post(sign: dict[str, Any]) -> None:
        client.key_value_set(f"selm/sign/{me}", json.dumps(sign), allow_overwrite=True)

    def read() -> dict[int, dict[str, Any]]:
        posted = client.key_value_dir_get("selm/sign/")
        return {int(key.rpartition("/")[2]): json.loads(sign) for key, sign in posted}

    # Registered after jax's own function, so called before it, which waits for the other processes.
    atexit.register(watch.begin(here, me, least=least, post=post, read=read))


@contextlib.contextmanager
def _unasked() -> Iterator[None]:
    """Makes jax respect TPU_SKIP_MDS_QUERY in a `with` block: it does not ask the metadata server.

    GKE's containers set this variable. jax would ask the metadata server regardless, wait, and fail
    if there is none (https://github.com/jax-ml/jax/issues/40854). It does not ask for values that
    are set, even if they are empty.
    """
    skip = "TPU_SKIP_MDS_QUERY" in os.environ
    unsaid = [name for name in _SLICES if skip and name not in os.environ]
    os.environ.update(dict.fromkeys(unsaid, ""))
    try:
        yield
    finally:
        for name in unsaid:
            del os.environ[name]  # libtpu reads them too


def count() -> int:
    return jax.process_count() if distributed.global_state.client is not None else 1


def index() -> int:
    return jax.process_index() if distributed.global_state.client is not None else 0


def is_first() -> bool:
    return index() == 0


# --- agreeing on values ---------------------------------------------------------------------------


def on_first(work: Callable[[], T]) -> T:
    """Runs `work` in the first process only, and returns the result (JSON) in all processes.

    Raises:
      Exception: in the first process, the exception that `work` raised.
      MultihostError: in the other processes, with the message of that exception; or if the first
        process is not at the same call as this one.
    """
    if count() == 1:
        return work()
    client, key = distributed.global_state.client, f"selm/{_step()}"
    assert client is not None
    name = getattr(work, "__qualname__", type(work).__qualname__)
    if not is_first():
        with here.waiting():
            told = json.loads(client.blocking_key_value_get(key, _WATCHED))
        if told["work"] != name:
            raise MultihostError(
                f"process 0 is at {told['work']}, but process {index()} is at {name}: they do "
                "not run the same steps. Start all processes again"
            )
        if "error" in told:
            raise MultihostError(f"process 0 failed: {told['error']}")
        return told["result"]

    def tell(**outcome: Any) -> None:
        client.key_value_set(key, json.dumps({"work": name} | outcome))

    try:
        result = work()
    except BaseException as e:
        tell(error=f"{type(e).__name__}: {e}")
        raise
    tell(result=result)
    return json.loads(json.dumps(result))


def on_every(work: Callable[[], T]) -> list[T]:
    """Runs `work` in every process, and returns the list of all results (JSON) in each process.

    `work` must not raise, because the other processes would not learn of it; it has to return its
    errors.
    """
    if count() == 1:
        return [work()]
    client, key = distributed.global_state.client, f"selm/{_step()}"
    assert client is not None
    client.key_value_set(f"{key}/{index()}", json.dumps(work()))
    with here.waiting():
        each = [client.blocking_key_value_get(f"{key}/{i}", _WATCHED) for i in range(count())]
    return [json.loads(told) for told in each]


def _step() -> int:
    """The number of this call of all processes, which is also a sign that this one goes on."""
    here.sign(step=True)
    return next(_numbers)


def leave(name: str, value: Any) -> None:
    """Stores a JSON value under a name, for `left` to read. Any thread may call this function."""
    client = distributed.global_state.client
    assert client is not None
    client.key_value_set(f"selm/left/{name}/{index()}", json.dumps(value), allow_overwrite=True)


def left(name: str) -> list[Any]:
    """The values that the processes stored with `leave`, in order; [] with a single process."""
    if count() == 1:
        return []
    client = distributed.global_state.client
    assert client is not None
    keys = [f"selm/left/{name}/{i}" for i in range(count())]
    return [json.loads(client.blocking_key_value_get(key, _WATCHED)) for key in keys]


def check_same(what: str, value: Callable[[], Any]) -> None:
    """Checks that `value` returns the same JSON here as in the first process.

    Raises:
      MultihostError: if they differ; the message begins with `what`.
    """
    if count() == 1:
        return
    mine = value()
    first = on_first(lambda: mine)
    if first != mine:
        raise MultihostError(
            f"{what}: {first} in process 0, but {mine} in process {index()}. Give a revision, or a "
            "folder that all hosts share"
        )


def all_failed(name: str, seconds: int = 120) -> None:
    """Waits until every process has called this function, that is, until all have failed.

    Raises:
      MultihostError: the others have not called it after that many seconds, so they still work.
    """
    if count() == 1:
        return
    client = distributed.global_state.client
    assert client is not None
    try:
        with here.waiting():
            client.wait_at_barrier(f"selm/failed/{name}", seconds * 1000)
    except jax.errors.JaxRuntimeError as e:
        raise MultihostError(
            f"process {index()} has failed, but other processes are still running after {seconds} "
            "s. Stop them, and start all processes again"
        ) from e


def barrier() -> None:
    """Waits until every process has called this function."""
    if count() > 1:
        client = distributed.global_state.client
        assert client is not None
        with here.waiting():
            client.wait_at_barrier(f"selm/barrier/{_step()}", _WATCHED)


def first_then_others(work: Callable[[], T]) -> T:
    """Runs `work` first in process 0, so that it fills a shared cache, and then in the others."""
    if count() == 1:
        return work()
    result = [None]

    def note() -> None:
        result[0] = work()  # pyright: ignore

    on_first(note)
    return result[0] if is_first() else work()  # pyright: ignore


# Parts of the messages of jax, its coordinator and gloo if another process does not answer.
_GONE = (
    *("CoordinationService", "heartbeat", "Socket closed", "Connection reset by peer"),
    *("Connection closed by peer", "Connection refused"),
)


def others_are_gone(error: BaseException) -> bool:
    """Returns whether the cause of an error is that another process of this run has died.

    This is so if the error, or one of its causes, is a jax error with such a message, or orbax's
    timeout while waiting for the others to write their parts of a checkpoint.
    """
    if count() == 1:
        return False
    cause: BaseException | None = error
    while cause is not None:
        text = str(cause)
        if isinstance(cause, jax.errors.JaxRuntimeError) and any(sign in text for sign in _GONE):
            return True
        if isinstance(cause, TimeoutError) and "barrier" in text:
            return True
        cause = cause.__cause__
    return False


# --- being told to stop ---------------------------------------------------------------------------


def listen() -> None:
    """Makes SIGTERM stop the run: at once if nothing would be lost, otherwise after saving.

    With several processes jax handles the signal, and passes it on from one process to all.
    """
    if count() == 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(*_: Any) -> None:
    _told_to_stop.set()
    if not _deferred:
        raise Stopped


@contextlib.contextmanager
def stop_deferred() -> Iterator[None]:
    """Keeps signals from interrupting a `with` block; the run checks `should_stop` instead.

    With several processes, Ctrl-C in one of them still interrupts: the others do not learn of it,
    so this process ends, and they end with it.
    """
    global _deferred
    _deferred = True
    try:
        with interrupt.deferred() if count() == 1 else contextlib.nullcontext():
            yield
    finally:
        _deferred = False


def should_stop() -> bool:
    """Says whether the run should stop now; the same call returns the same answer in all processes.

    Call it wherever stopping is possible: between updates, between batches of answers.

    Raises:
      KeyboardInterrupt: if there are several processes and Ctrl-C was pressed in this one.
    """
    here.sign(step=True)
    if interrupt.asked():
        if count() > 1:
            raise KeyboardInterrupt
        return True
    if _told_to_stop.is_set():
        return True
    if count() > 1 and multihost_utils.reached_preemption_sync_point(next(_boundaries)):
        _told_to_stop.set()  # jax reports it only once
    return _told_to_stop.is_set()


def stop_if_told() -> None:
    """Raises `stopped()` if the run was told to stop. Call it where nothing has to be saved."""
    if should_stop():
        raise stopped()


def stopped() -> BaseException:
    """The exception with which to end a run: KeyboardInterrupt after Ctrl-C, otherwise Stopped."""
    return KeyboardInterrupt() if interrupt.asked() else Stopped()
