"""Finds out from the environment which processes a run has, and how patient they are."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from jax._src.clusters import ClusterEnv

from selm_jax.parallel import watch

_EXPLICIT = ("SELM_COORDINATOR", "SELM_PROCESSES", "SELM_PROCESS")


class MultihostError(RuntimeError):
    """The processes of a run cannot work together."""


def found(environment: Mapping[str, str]) -> dict[str, Any] | None:
    """The arguments for `jax.distributed.initialize`; None if this is the only process."""
    given = [name for name in _EXPLICIT if name in environment]
    if given:
        try:
            address, count, index = (environment[name] for name in _EXPLICIT)
            numbers = int(count), int(index)
        except (KeyError, ValueError):
            shown = ", ".join(f"{name}={environment.get(name, '(not set)')}" for name in _EXPLICIT)
            raise MultihostError(
                f"{shown}: set all three, the last two to numbers, for example "
                "SELM_COORDINATOR=10.0.0.1:1234 SELM_PROCESSES=2 SELM_PROCESS=0"
            ) from None
        if not 0 <= numbers[1] < numbers[0] or ":" not in address:
            raise MultihostError(
                f"SELM_COORDINATOR={address}, SELM_PROCESS={index} of SELM_PROCESSES={count}: "
                "expected host:port, and a process from 0 to SELM_PROCESSES - 1"
            )
        # Without local_device_ids jax uses all devices of this host.
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
            f"the number of processes could not be found: {e}. On a TPU without a metadata server "
            "set TPU_SKIP_MDS_QUERY=1"
        ) from e
    return None


def _all_gpus_of(environment: Mapping[str, str]) -> dict[str, Any]:
    """Arguments that give jax all GPUs of a node, if SLURM runs one process per node; else {}.

    Under SLURM jax would give each process only one GPU.
    """
    nodes = environment.get("SLURM_STEP_NUM_NODES")
    gpus = environment.get("SLURM_GPUS_ON_NODE", "")
    if nodes and nodes == environment.get("SLURM_NTASKS") and gpus.isdigit():
        return {"local_device_ids": list(range(int(gpus)))}
    return {}


def patience(environment: Mapping[str, str]) -> float:
    """The seconds that any piece of a process's work may take: SELM_PATIENCE, or half an hour."""
    told = environment.get("SELM_PATIENCE")
    try:
        seconds = watch.PATIENCE if told is None else float(told)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < math.inf:
        raise MultihostError(
            f"SELM_PATIENCE={told}: expected the seconds that a process may take for a piece of "
            "work before the others give it up, for example 1800"
        )
    return seconds
