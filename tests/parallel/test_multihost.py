"""Processes find each other, agree, and stop together."""

from __future__ import annotations

import json
import os
import signal

import jax
import pytest

from selm_jax.parallel import multihost
from selm_jax.parallel.multihost import MultihostError, Stopped, found

SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_NODELIST": "gpu[07,09]", "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_NODES": "2",
    "SLURM_GPUS_ON_NODE": "8",
}  # fmt: skip
OMPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "2",
}  # fmt: skip
TOLD = {"SELM_COORDINATOR": "10.0.0.1:1234", "SELM_PROCESSES": "3", "SELM_PROCESS": "2"}


@pytest.fixture
def surroundings(monkeypatch):
    """Sets the environment, of which jax reads the same, free of what this machine has."""

    def be(environment):
        for name in list(os.environ):
            if name.startswith(("SLURM_", "OMPI_", "SELM_")):
                monkeypatch.delenv(name)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return found(os.environ)

    return be


def test_a_single_process_is_alone(surroundings):
    assert surroundings({}) is None
    assert surroundings(SLURM | {"SLURM_NTASKS": "1"}) is None
    # In a job's script, outside `srun`, there is no step.
    assert surroundings({k: v for k, v in SLURM.items() if "STEP" not in k}) is None


def test_under_slurm_a_process_has_all_gpus_of_its_node(surroundings):
    assert surroundings(SLURM) == {"local_device_ids": list(range(8))}
    # One process for each GPU: jax's own way.
    assert surroundings(SLURM | {"SLURM_NTASKS": "16"}) == {}


def test_under_open_mpi_jax_finds_the_processes(surroundings):
    assert surroundings(OMPI) == {}


def test_a_coordinator_by_environment_comes_first(surroundings):
    assert surroundings(TOLD | SLURM) == {
        "coordinator_address": "10.0.0.1:1234", "num_processes": 3, "process_id": 2,
        "cluster_detection_method": "deactivate",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"SELM_PROCESS": None}, r"SELM_PROCESS=\(not set\): set all three"),
        ({"SELM_PROCESSES": "two"}, "SELM_PROCESSES=two.*set all three"),
        ({"SELM_PROCESS": "3"}, "SELM_PROCESS=3 of SELM_PROCESSES=3"),
        ({"SELM_COORDINATOR": "10.0.0.1"}, "expected host:port"),
    ],
)
def test_an_incomplete_environment_is_refused(surroundings, changes, message):
    with pytest.raises(MultihostError, match=message):
        surroundings({k: v for k, v in (TOLD | changes).items() if v is not None})


def test_one_process_is_the_first_and_agrees_with_itself():
    assert multihost.is_first() and multihost.count() == 1
    assert multihost.on_first(lambda: {"a": 1}) == {"a": 1}
    assert multihost.first_then_others(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        multihost.on_first(lambda: 1 // 0)
    multihost.barrier()


class Told:
    """The values that process 0 has sent to the coordinator."""

    def __init__(self, **told):
        self.told = told

    def blocking_key_value_get(self, key, milliseconds):
        return json.dumps(self.told)

    def wait_at_barrier(self, name, milliseconds):
        raise jax.errors.JaxRuntimeError(f"DEADLINE_EXCEEDED: {name}, {milliseconds} ms")


@pytest.fixture
def second(monkeypatch):
    """Makes this process the second of two; the values sent by the first are given."""

    def be(**told):
        monkeypatch.setattr(multihost, "count", lambda: 2)
        monkeypatch.setattr(multihost, "index", lambda: 1)
        monkeypatch.setattr(multihost.distributed.global_state, "client", Told(**told))

    return be


def work():
    raise AssertionError("the first process does it")


def test_the_second_process_gets_the_result_of_the_first(second):
    second(work="work", result=[1])
    assert multihost.on_first(work) == [1]
    second(work="work", error="OSError: full")
    with pytest.raises(MultihostError, match="process 0 failed: OSError: full"):
        multihost.on_first(work)


def test_processes_that_have_gone_different_ways_do_not_go_on(second):
    second(work="another", result=[1])
    with pytest.raises(MultihostError, match="process 0 is at another, but process 1 is at work: "):
        multihost.on_first(work)
    with pytest.raises(MultihostError, match="but other processes are still running after 3 s"):
        multihost.all_failed("sweep/1", seconds=3)


def test_processes_that_found_different_models_do_not_begin(second):
    told = "check_same.<locals>.<lambda>"
    second(work=told, result={"commit": "abc"})
    multihost.check_same("the start model", lambda: {"commit": "abc"})
    with pytest.raises(MultihostError, match=r"the start model: .*abc.* in process 0, .*def.* in "):
        multihost.check_same("the start model", lambda: {"commit": "def"})


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        # The messages of jax 0.10 after process 1, process 0 and a peer of gloo were killed.
        (
            (
                "INTERNAL: Barrier failed because: task is set to ERROR: UNAVAILABLE: Task 1 "
                "heartbeat timeout"
            ),
            True,
        ),
        ("UNAVAILABLE: recvmsg:Connection reset by peer\nAdditional GRPC error information", True),
        ("FAILED_PRECONDITION: Gloo AllReduce failed: Connection closed by peer", True),
        ("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.", False),
    ],
)
def test_a_process_left_by_the_others_says_so(second, monkeypatch, error, gone):
    error = jax.errors.JaxRuntimeError(error)
    assert not multihost.others_are_gone(error), "alone there are no others"
    second()
    assert multihost.others_are_gone(error) == gone
    assert not multihost.others_are_gone(ValueError(str(error)))
    try:
        raise ValueError("a checkpoint could not be written") from error
    except ValueError as e:
        assert multihost.others_are_gone(e) == gone


def test_sigterm_stops_at_once_but_where_it_is_deferred(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    multihost.listen()
    try:
        assert not multihost.should_stop()
        with pytest.raises(Stopped) as stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        assert stopped.value.code == 75
        multihost._told_to_stop.clear()
        with multihost.stop_deferred():
            os.kill(os.getpid(), signal.SIGTERM)
            assert multihost.should_stop()
        with pytest.raises(Stopped):
            multihost.stop_if_told()
    finally:
        signal.signal(signal.SIGTERM, before)
        multihost._told_to_stop.clear()
