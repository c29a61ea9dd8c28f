"""The protocol of all benchmark contestants: each does and times single steps on request.

A contestant is a process. When it is ready, it prints one line of JSON and waits. Each line on its
standard input requests one step, and each step prints one line of JSON. It exits when its input
ends. So the steps of several contestants can take turns.

All contestants' environments import this file, so it uses only the standard library.
"""

import json
import os
import resource
import sys
import time


class Worker:
    """A contestant's side of the protocol: it receives requests, times steps and sends results.

    Before and after each step it also times a 2048^3 float32 matrix product, to measure the
    machine's speed at that moment: a virtual machine does not always get its full cores.
    """

    def __init__(self, matmul):
        """Takes over standard output; `matmul` computes a 2048^3 product and waits for it."""
        # Libraries may print. The pipe is reserved for answers; other output goes to the log.
        self._pipe = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self._matmul = matmul
        for _ in range(3):
            self._rate()

    def ready(self, versions):
        self._send({"versions": versions})

    def wait(self):
        """Waits for the next request; False if there are no more."""
        return bool(sys.stdin.readline())

    def begin(self):
        self._before = self._rate()
        self._began = time.perf_counter()

    def end(self, **about):
        seconds = time.perf_counter() - self._began
        after = self._rate()
        self._send(
            {"seconds": seconds, "gflops": [self._before, after], "peak_mib": peak_mib(), **about}
        )

    def _rate(self):
        # The best of two: the first one after a step must allocate memory that the step freed.
        best = 0.0
        for _ in range(2):
            began = time.perf_counter()
            self._matmul()
            best = max(best, 2e-9 * 2048**3 / (time.perf_counter() - began))
        return best

    def _send(self, message):
        self._pipe.write(json.dumps(message) + "\n")
        self._pipe.flush()


def torch_worker():
    import torch

    x = torch.randn(2048, 2048)
    return Worker(lambda: torch.mm(x, x))


def jax_worker():
    import jax

    x = jax.random.normal(jax.random.key(0), (2048, 2048))
    matmul = jax.jit(lambda x: x @ x)
    return Worker(lambda: matmul(x).block_until_ready())


def peak_mib():
    """Peak memory of this process in MiB."""
    try:
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) for line in f if line.startswith("VmHWM")) / 1024
    except FileNotFoundError:  # not Linux; there ru_maxrss would count the parent's memory too
        unit = 2**20 if sys.platform == "darwin" else 2**10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def read_data(file):
    with open(file) as f:
        return json.load(f)


def versions(*packages):
    from importlib.metadata import version

    return {name: version(name) for name in packages}
