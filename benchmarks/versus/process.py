"""Runs contestants as processes that take turns, step by step."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue

from versus.contestants import ALL, Comparison, Contestant

SCRIPTS = Path(__file__).resolve().parents[1] / "contestants"
PATIENCE = 900  # seconds to wait for a contestant's answer


class Process:
    """The running process of a contestant."""

    def __init__(self, contestant: Contestant, python: str, model: Path, data: Path, logs: Path):
        self.contestant = contestant
        self.log = logs / f"{contestant.key}.log"
        command = [python, str(SCRIPTS / f"{contestant.script}.py"), str(model)]
        # Torch's spinning threads would take the other contestants' cores between its steps.
        environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
        if contestant.environment == "ours":
            paths = [str(SCRIPTS.parents[1]), environment.get("PYTHONPATH", "")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [*command, str(data), *contestant.arguments],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env=environment,
            )  # fmt: skip
        self.lines: Queue[str] = Queue()
        threading.Thread(target=self._listen, daemon=True).start()
        self.about = self._answer()

    def step(self) -> dict:
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def _listen(self) -> None:
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put("")

    def _answer(self) -> dict:
        try:
            line = self.lines.get(timeout=PATIENCE)
        except Empty:
            line = ""
        if not line:
            self.process.kill()
            tail = self.log.read_text(errors="replace")[-2000:]
            sys.exit(
                f"{self.contestant.title} stopped or did not answer. The end of its log:\n{tail}"
            )
        return json.loads(line)


@dataclass
class Measured:
    """Results of a contestant in a comparison: its versions, and its steps after the warm-up."""

    about: dict
    steps: list[dict] = field(default_factory=list)

    @property
    def seconds(self) -> list[float]:
        return [s["seconds"] for s in self.steps]

    @property
    def scoring(self) -> list[float]:
        return [s["score_seconds"] for s in self.steps if "score_seconds" in s]

    @property
    def gflops(self) -> list[float]:
        return [rate for s in self.steps for rate in s["gflops"]]

    @property
    def rates(self) -> list[float]:
        """The mean GFLOP/s of the matrix products that are timed before and after each step."""
        return [sum(s["gflops"]) / len(s["gflops"]) for s in self.steps]

    @property
    def peak(self) -> float:
        return max(s["peak_mib"] for s in self.steps)


def compare(
    comparison: Comparison,
    pythons: dict[str, str],
    model: Path,
    data: dict,
    folder: Path,
    *,
    warmup: int,
    rounds: int,
    without: Sequence[str] = (),
) -> dict[str, Measured]:
    """Runs one comparison: starts and warms up all contestants, then runs the rounds.

    Args:
      pythons: the Python of each environment; contestants of others are left out.
      folder: for data and logs.
    """
    folder = folder / comparison.title
    folder.mkdir()
    file = folder / "data.json"
    file.write_text(json.dumps(data | {"generate": data["generate"][: comparison.prompts]}))
    expected = comparison.prompts * data["settings"]["response"]
    processes: dict[str, Process] = {}
    try:
        for key in comparison.contestants:
            if ALL[key].environment in pythons and key not in without:
                began = time.perf_counter()
                python = pythons[ALL[key].environment]
                processes[key] = Process(ALL[key], python, model, file, folder)
                ready = time.perf_counter() - began
                warm = [processes[key].step() for _ in range(warmup)]
                line = f"ready in {ready:.0f} s, warm-up {[round(s['seconds'], 2) for s in warm]}"
                say(f"{comparison.title}: {ALL[key].title}: {line}")
        found = {key: Measured(process.about) for key, process in processes.items()}
        for turn in range(rounds):
            for key, process in processes.items():
                step = process.step()
                found[key].steps.append(step)
                check_tokens(ALL[key], step, expected)
            line = ", ".join(f"{key} {m.seconds[-1]:.2f} s" for key, m in found.items())
            say(f"{comparison.title}: round {turn + 1} of {rounds}: {line}")
        return found
    finally:
        for process in processes.values():
            process.close()


def check_tokens(contestant: Contestant, step: dict, expected: int) -> None:
    """Checks that a contestant generated the expected number of tokens."""
    if step.get("tokens", expected) != expected:
        sys.exit(f"{contestant.title} generated {step['tokens']} tokens; expected {expected}")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
