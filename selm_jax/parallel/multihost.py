"""Several processes, one program: who they are, and how they agree on small things.

Every process runs the same stages in the same order; arrays are cut over the devices of all. What
only one may do (write a file, look whether one is there, ask a judge) is done by the first and told
to the others: `on_first`. This goes through the coordinator of `jax.distributed`, not through the
devices, so that a process may wait for hours while another one ranks.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import jax
from jax._src import distributed  # its client has no public name; orbax uses it too
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from selm_jax.shell import interrupt

T = TypeVar("T")

_EXPLICIT = ("SELM_COORDINATOR", "SELM_PROCESSES", "SELM_PROCESS")
_SLICES = ("MEGASCALE_COORDINATOR_ADDRESS", "MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID")
_WEEK = 7 * 24 * 3600 * 1000  # milliseconds: people may be asked meanwhile
_numbers = itertools.count()  # the same in all processes, which all come by in the same order
_boundaries = itertools.count()
_told_to_stop = threading.Event()
_deferred = False


class MultihostError(RuntimeError):
    """The processes of a run cannot work together."""


class Stopped(SystemExit):
    """The run was told to stop (SIGTERM, preemption) and has saved what there was to save.

    The process leaves with status 75, EX_TEMPFAIL of sysexits.h: try again.
    """

    def __init__(self):
        super().__init__(75)


# --- who they are ---------------------------------------------------------------------------------


def initialize() -> None:
    """Joins the other processes, if there are any; before anything else of jax.

    On TPU pods, under SLURM and under Open MPI jax finds out by itself. Elsewhere the environment
    says it: SELM_COORDINATOR=host:port (of process 0), SELM_PROCESSES, SELM_PROCESS.

    Raises:
      MultihostError: the environment says it in part, or not in numbers; or who knows it, such as
        a TPU's metadata server, does not answer.
    """
    with _unasked():
        arguments = found(os.environ)
        if arguments is None:
            return
        # Of CPU devices: between processes there is no other way than gloo.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(**arguments)


@contextlib.contextmanager
def _unasked() -> Iterator[None]:
    """Inside, jax asks no metadata server for slices where TPU_SKIP_MDS_QUERY says not to.

    GKE's containers say so; jax would ask all the same, wait, and fail where nobody answers
    (https://github.com/jax-ml/jax/issues/40854). What is empty it does not ask for.
    """
    skip = "TPU_SKIP_MDS_QUERY" in os.environ
    unsaid = [name for name in _SLICES if skip and name not in os.environ]
    os.environ.update(dict.fromkeys(unsaid, ""))
    try:
        yield
    finally:
        for name in unsaid:
            del os.environ[name]  # libtpu reads them, too


def found(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """What `jax.distributed.initialize` has to be told; None where this process is alone."""
    given = [name for name in _EXPLICIT if name in environment]
    if given:
        try:
            address, count, index = (environment[name] for name in _EXPLICIT)
            numbers = int(count), int(index)
        except (KeyError, ValueError):
            shown = ", ".join(f"{name}={environment.get(name, '(not set)')}" for name in _EXPLICIT)
            raise MultihostError(
                f"{shown}: expected all three, such as SELM_COORDINATOR=10.0.0.1:1234 "
                "SELM_PROCESSES=2 SELM_PROCESS=0"
            ) from None
        if not 0 <= numbers[1] < numbers[0] or ":" not in address:
            raise MultihostError(
                f"SELM_COORDINATOR={address}, SELM_PROCESS={index} of SELM_PROCESSES={count}: "
                "expected host:port, and a process from 0 to one less than their number"
            )
        # No local_device_ids: all devices of this host, and jax looks no further.
        return {
            "coordinator_address": address, "num_processes": numbers[0], "process_id": numbers[1],
            "cluster_detection_method": "deactivate",
        }  # fmt: skip
    try:
        for cluster in ClusterEnv._cluster_types:
            if not cluster.opt_in_only_method and cluster.is_env_present():
                return None if cluster.get_process_count() == 1 else _all_gpus_of(environment)
    except OSError as e:
        raise MultihostError(
            f"how many processes are to be one run was asked in vain: {e}. On a TPU where there is no "
            "metadata server set TPU_SKIP_MDS_QUERY=1"
        ) from e
    return None


def _all_gpus_of(environment: Mapping[str, str]) -> dict[str, Any]:
    """Under SLURM jax gives each process one GPU, which is wrong where a node has one process."""
    nodes = environment.get("SLURM_STEP_NUM_NODES")
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    if nodes and nodes == environment.get("SLURM_NTASKS") and gpus.isdigit():
        return {"local_device_ids": list(range(int(gpus)))}
    return {}


def count() -> int:
    return jax.process_count() if distributed.global_state.client is not None else 1


def index() -> int:
    return jax.process_index() if distributed.global_state.client is not None else 0


def is_first() -> bool:
    return index() == 0


# --- how they agree -------------------------------------------------------------------------------


def on_first(work: Callable[[], T]) -> T:
    """Runs `work` in the first process, and gives what it returns, as JSON, to all.

    Raises:
      Exception: what `work` raised, in the first process.
      MultihostError: the same in the others, with its message; or the first process is at other
        work than this one.
    """
    if count() == 1:
        return work()
    client, key = distributed.global_state.client, f"selm/{next(_numbers)}"
    assert client is not None
    name = getattr(work, "__qualname__", type(work).__qualname__)
    if not is_first():
        told = json.loads(client.blocking_key_value_get(key, _WEEK))
        if told["work"] != name:
            raise MultihostError(
                f"process 0 is at {told['work']}, process {index()} at {name}: they have gone "
                "different ways. Start all of them again"
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
    """Runs `work` in every process, and gives all of them what each returns, as JSON, in order.

    Of `work` that raises, the others never hear; what can go wrong is to be in what it returns.
    """
    if count() == 1:
        return [work()]
    client, key = distributed.global_state.client, f"selm/{next(_numbers)}"
    assert client is not None
    client.key_value_set(f"{key}/{index()}", json.dumps(work()))
    each = [client.blocking_key_value_get(f"{key}/{i}", _WEEK) for i in range(count())]
    return [json.loads(told) for told in each]


def leave(name: str, value: Any) -> None:
    """Leaves JSON under a name, for `left`; unlike all else here from any thread."""
    client = distributed.global_state.client
    assert client is not None
    client.key_value_set(f"selm/left/{name}/{index()}", json.dumps(value), allow_overwrite=True)


def left(name: str) -> list[Any]:
    """What each process has left under a name; nothing of a process that is alone."""
    if count() == 1:
        return []
    client = distributed.global_state.client
    assert client is not None
    each = [client.blocking_key_value_get(f"selm/left/{name}/{i}", _WEEK) for i in range(count())]
    return [json.loads(value) for value in each]


def check_same(what: str, value: Callable[[], Any]) -> None:
    """Compares what `value` returns, which is JSON, with that of the first process.

    Raises:
      MultihostError: the first process has another one.
    """
    if count() == 1:
        return
    mine = value()
    first = on_first(lambda: mine)
    if first != mine:
        raise MultihostError(
            f"{what}: {first} in process 0, {mine} in process {index()}. Name a revision, or a "
            "folder that all hosts see"
        )


def all_failed(name: str, seconds: int = 120) -> None:
    """Returns when every process has come here: what failed, failed in all of them.

    Raises:
      MultihostError: the others have not after so many seconds; they are at work without this one.
    """
    if count() == 1:
        return
    client = distributed.global_state.client
    assert client is not None
    try:
        client.wait_at_barrier(f"selm/failed/{name}", seconds * 1000)
    except jax.errors.JaxRuntimeError as e:
        raise MultihostError(
            f"process {index()} alone has failed; no other came by within {seconds} s. Start all "
            "of them again"
        ) from e


def barrier() -> None:
    """Waits until every process has come here."""
    if count() > 1:
        client = distributed.global_state.client
        assert client is not None
        client.wait_at_barrier(f"selm/barrier/{next(_numbers)}", _WEEK)


def first_then_others(work: Callable[[], T]) -> T:
    """Runs `work` everywhere, in the others when the first is through: it may fill a shared cache."""
    if count() == 1:
        return work()
    result = [None]

    def note() -> None:
        result[0] = work()  # pyright: ignore

    on_first(note)
    return result[0] if is_first() else work()  # pyright: ignore


# What jax says in its own words, of its coordinator and of gloo, when another process does not answer.
_GONE = (
    *("CoordinationService", "heartbeat", "Socket closed", "Connection reset by peer"),
    *("Connection closed by peer", "Connection refused"),
)


def others_are_gone(error: BaseException) -> bool:
    """Whether an error is that another process of this run has died, and none of this one's own.

    So it is if an error that it comes from is jax's, and says so, or orbax waited in vain for the
    others to write their parts of a checkpoint.
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
    """From now on SIGTERM stops the run: at once where nothing is lost, else when it has saved.

    With several processes jax listens itself, and passes the notice of one on to all.
    """
    if count() == 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _on_sigterm)


def _on_sigterm(*_: Any) -> None:
    _told_to_stop.set()
    if not _deferred:
        raise Stopped


@contextlib.contextmanager
def stop_deferred() -> Iterator[None]:
    """Inside, whoever asks `should_stop` stops the run; it is not interrupted. But by Ctrl-C in one of
    several processes, of which the others do not hear: that one ends, and they with it."""
    global _deferred
    _deferred = True
    try:
        with interrupt.deferred() if count() == 1 else contextlib.nullcontext():
            yield
    finally:
        _deferred = False


def should_stop() -> bool:
    """Whether to stop here: the same answer in all processes, at the same call.

    To be asked where stopping is possible: between updates, between batches of answers.

    Raises:
      KeyboardInterrupt: Ctrl-C was pressed in this one of several processes.
    """
    if interrupt.asked():
        if count() > 1:
            raise KeyboardInterrupt
        return True
    if _told_to_stop.is_set():
        return True
    if count() > 1 and multihost_utils.reached_preemption_sync_point(next(_boundaries)):
        _told_to_stop.set()  # jax says so once
    return _told_to_stop.is_set()


def stop_if_told() -> None:
    """Raises what `stopped` gives if the run is to stop; where nothing has to be saved first."""
    if should_stop():
        raise stopped()


def stopped() -> BaseException:
    """What a run that is to stop ends with: KeyboardInterrupt after Ctrl-C, else Stopped."""
    return KeyboardInterrupt() if interrupt.asked() else Stopped()
