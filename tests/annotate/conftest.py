"""A store of questions, and a server for it in a process of its own."""

import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from forked import free_port

from selm_jax.annotate.store import Annotations, Item

TOKEN = "a-token-for-the-tests-0123456789"
BATCH = "run/iteration_1"

# Serves a store. With `die` the first judgement kills the process: before it is noted, or after.
SERVE = """
import os, signal, sys
from pathlib import Path
from selm_jax.annotate import server
from selm_jax.annotate.store import Annotations
file, port, die, instructions = sys.argv[1:]
class Dying(Annotations):
    def judge(self, *arguments, **settings):
        if die == "after":
            super().judge(*arguments, **settings)
        os.kill(os.getpid(), signal.SIGKILL)
store = (Annotations if die == "never" else Dying)(Path(file))
batch = "run/iteration_1"
server.serve(store, batch, batch, "127.0.0.1", int(port), instructions=instructions)
"""


class Served:
    """A server of a store that can be killed and started again at the same address."""

    def __init__(self, file: Path):
        self.file = file
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}/{TOKEN}/"
        self.process: subprocess.Popen | None = None

    def start(self, die: str = "never", instructions: str = "") -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(self.file), str(self.port), die, instructions],
            env=os.environ | {"SELM_ANNOTATE_TOKEN": TOKEN},
        )
        for _ in range(300):
            try:
                urllib.request.urlopen(self.url, timeout=5).read()
                return
            except (urllib.error.URLError, ConnectionError):
                assert self.process.poll() is None, "the server has ended"
                time.sleep(0.1)
        raise AssertionError(f"{self.url} does not answer")

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture(scope="session")
def item():
    """A question of a number, with so many answers."""

    def make(number: int, answers: int = 3) -> Item:
        texts = tuple(f"Answer {letter} to question {number}." for letter in "xyzwv"[:answers])
        return Item(f"p{number}", (("user", f"Question {number}?"),), texts)

    return make


@pytest.fixture
def store(tmp_path):
    return Annotations(tmp_path / "people" / "annotations.sqlite")


@pytest.fixture
def serve():
    """Serves the given questions; returns the server."""
    running = []

    def start(
        store: Annotations, items, minimum: int = 1, die: str = "never", instructions: str = ""
    ) -> Served:
        store.put(BATCH, items, minimum)
        served = Served(store.path)
        running.append(served)
        served.start(die, instructions)
        return served

    yield start
    for each in running:
        each.stop()
