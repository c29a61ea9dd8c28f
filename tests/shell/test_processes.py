"""Daemons that a rule or a server leaves behind (new group, session and parent) are ended."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selm_jax.feedback.ranker import FeedbackError, Question, build_ranker
from selm_jax.shell import processes

RULES = """
import json, os, time
from pathlib import Path

def daemon(file):
    \"\"\"A child's child in a session of its own, whose parent has ended.\"\"\"
    if os.fork():
        os.wait()
        return
    os.setsid()
    if os.fork():
        os._exit(0)
    with open(file, "a") as f:
        f.write(f"{os.getpid()}\\n")
    os.execvp("sleep", ["sleep", "600"])

def waits(file, count):
    while not (Path(file).exists() and len(Path(file).read_text().split()) >= count):
        time.sleep(0.01)

def leaves(prompt, response, row):
    daemon(row["file"])
    waits(row["file"], int(response))
    return 1.0

def fails(prompt, response, row):
    return leaves(prompt, response, row) / 0

def hangs(prompt, response, row):
    leaves(prompt, response, row)
    time.sleep(600)
"""
RUN = """
import sys
from selm_jax.shell import processes
from selm_jax.feedback.ranker import Question, build_ranker
if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    row = {"file": sys.argv[2]}
    build_ranker("leaving_rules:hangs").scores([Question("q", (), row, "p")], [["1"]])
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="daemons are found on Linux alone")


@pytest.fixture
def file(tmp_path, monkeypatch):
    (tmp_path / "leaving_rules.py").write_text(RULES)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    sys.modules.pop("leaving_rules", None)
    return tmp_path / "daemons"


def alive(file):
    def is_there(pid):
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:
            return False

    return [pid for pid in file.read_text().split() if is_there(pid)]


def gone(file, seconds=30):
    until = time.monotonic() + seconds
    while alive(file) and time.monotonic() < until:
        time.sleep(0.02)
    return not alive(file)


def asked(name, file, texts, **settings):
    questions = [Question("q", (), {"file": str(file)}, "p")]
    return build_ranker(f"leaving_rules:{name}", **settings).scores(questions, [texts])


def test_daemons_end_with_the_ranking(file):
    (scores,) = asked("leaves", file, ["1", "2", "3"])
    assert scores.tolist() == [1.0] * 3
    assert len(file.read_text().split()) == 3 and gone(file)


def test_daemons_of_a_call_that_fails_end_with_it(file):
    with pytest.raises(FeedbackError, match="raised ZeroDivisionError"):
        asked("fails", file, ["1"])
    assert file.read_text() and gone(file)


def test_daemons_of_a_killed_run_end(file, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(RUN)
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path), str(file)])
    until = time.monotonic() + 60
    while not (file.exists() and file.read_text().endswith("\n")) and time.monotonic() < until:
        time.sleep(0.02)
    assert len(alive(file)) == 1
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert gone(file)


SERVER = "import sys; import leaving_rules as r; r.daemon(sys.argv[1]); r.waits(sys.argv[1], 1)"


@pytest.mark.parametrize("then", ["pass", "import time; time.sleep(600)"])
def test_daemons_of_a_command_end_with_it(file, tmp_path, then):
    """Whether it ends by itself, as one that makes itself a daemon does, or is stopped."""
    command = [sys.executable, "-c", f"{SERVER}; {then}", str(file)]
    with (tmp_path / "log").open("wb") as log:
        process = processes.start(command, log)
    if then == "pass":
        assert process.wait(60) == 0
    else:
        until = time.monotonic() + 60
        while not file.exists() and time.monotonic() < until:
            time.sleep(0.02)
        processes.stop(process, 10)
    assert file.read_text() and gone(file)
