"""Starts `selm` in separate processes, quickly: forks a process that has imported everything.

A fresh interpreter would import for seconds before it does anything; a test that starts hundreds
has not got these. What is forked has never touched a device: everything from there on is real.
"""

from __future__ import annotations

import atexit
import contextlib
import multiprocessing
import os
import random
import signal
import socket
import sys
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

import pytest

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["forked", "warm"])


@cache
def _start_server() -> None:
    """Its imports need our path, which it is not given before Python 3.13."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()


class Selm:
    """`selm ARGUMENTS` in one process, or in several that are one run.

    Args:
      devices: CPU devices of each process.
      log: where their output goes: FILE.0, FILE.1, ...
      patience: SELM_PATIENCE of each process.
    """

    def __init__(
        self, arguments, *, folder: Path, cache: Path, devices=1, processes=1, log: Path,
        patience: float = 1800,
    ):  # fmt: skip
        _start_server()
        folder.mkdir(parents=True, exist_ok=True)
        environment = {
            "SELM_CACHE": str(cache),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "SELM_PATIENCE": str(patience),
            "PJRT_NPROC": "32",
            "TOKENIZERS_PARALLELISM": "false",
        }
        self.logs = [Path(f"{log}.{i}") for i in range(processes)]
        self._processes = []
        address = f"127.0.0.1:{free_port()}"
        for i in range(processes):
            own = {}
            if processes > 1:
                own = {"SELM_COORDINATOR": address, "SELM_PROCESSES": str(processes)}
                own["SELM_PROCESS"] = str(i)
            given = ([str(a) for a in arguments], str(folder), environment | own, str(self.logs[i]))
            process = _CONTEXT.Process(target=_main, args=given)
            process.start()
            self._processes.append(process)

    def running(self) -> bool:
        return all(p.is_alive() for p in self._processes)

    def signal(self, number: int, which: int = 0) -> None:
        if self._processes[which].is_alive():
            os.kill(self._processes[which].pid, number)

    def kill(self, first: int = 0) -> None:
        """kill -9, one process after the other."""
        count = len(self._processes)
        for i in range(count):
            self.signal(signal.SIGKILL, (first + i) % count)
        self.wait()

    def wait_for(self, which: int, seconds: float = 90) -> None:
        """Waits until one of the processes has ended."""
        self._processes[which].join(seconds)

    def wait(self, seconds: float = 300) -> list[int]:
        """Exit statuses; negative ones are signals."""
        for process in self._processes:
            process.join(seconds)
            if process.is_alive():
                self.kill()
                raise AssertionError(f"still running after {seconds} s\n{self.output()}")
        return [p.exitcode for p in self._processes]

    def output(self) -> str:
        return "\n".join(f"--- {log}\n{log.read_text()}" for log in self.logs if log.exists())


def free_port() -> int:
    """Below those that the system gives to sockets which name none: until it is bound, none of them
    can take it."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as s, contextlib.suppress(OSError):
            s.bind(("127.0.0.1", port))
            return port


def _main(arguments: list[str], folder: str, environment: dict[str, str], log: str) -> None:
    os.chdir(folder)
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.argv = ["selm", *arguments]
    from selm_jax import cli

    try:
        cli.main()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        atexit._run_exitfuncs()  # multiprocessing leaves without
