"""A user's function in separate processes: right, in order, stopped in time, never left behind."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from selm_jax.feedback import workers
from selm_jax.feedback.ranker import FeedbackError, Question, build_ranker

MODULE = """
import json, math, os, subprocess, sys, time

def good(prompt, response, row):
    return len(response) * row["weight"] + len(prompt)

def spoils_its_row(prompt, response, row):
    row["weight"] = row.get("weight", 0) + 1
    return row["weight"]

def spoils_its_list(prompt, response, row):
    row["given"][0]["n"] += 1
    return row["given"][0]["n"]

def spoils_their_lists(prompts, responses, rows):
    return [spoils_its_list("", "", row) for row in rows]

def who(prompt, response, row):
    time.sleep(0.02)
    return os.getpid()

def raises(prompt, response, row):
    return row["no_such_column"] if response == "bad" else 0.0

def nothing(prompt, response, row):
    print(response)

def not_a_number(prompt, response, row):
    return math.nan if response == "bad" else 0.0

def word(prompt, response, row):
    return "7/10"

def two(prompt, response):
    return 0.0

def hangs(prompt, response, row):
    if response.startswith("bad"):
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        with open(row["file"], "w") as f:
            json.dump([os.getpid(), child.pid], f)
        while True:
            pass
    return 1.0

def dies(prompt, response, row):
    if response == "bad":
        os.kill(os.getpid(), 9)
    return 1.0

def leaves(prompt, response, row):
    sys.exit(3)

def devices(prompt, response, row):
    import jax
    return os.environ["JAX_PLATFORMS"] == "cpu" and jax.default_backend() == "cpu"

def many(prompts, responses, rows):
    assert isinstance(prompts, list) and len(prompts) == len(responses) == len(rows)
    extra = 1000 * len(responses)
    each = zip(prompts, responses, rows)
    return [len(p) + 10 * len(r) + 100 * row["weight"] + extra for p, r, row in each]

def too_few(prompts, responses, rows):
    return [1.0] * (len(responses) - 1)

def one_bad(prompts, responses, rows):
    return [math.inf if r == "bad" else 0.0 for r in responses]

def an_array(prompts, responses, rows):
    import numpy as np
    return np.arange(len(responses), dtype=np.float32)

not_a_function = 3
"""


@pytest.fixture
def rules(tmp_path, monkeypatch):
    """The dotted name of a module of rules on sys.path."""
    package = tmp_path / "house_rules"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "taste.py").write_text(MODULE)
    (package / "broken.py").write_text("import no_such_library_here\n")
    (package / "syntax.py").write_text("def f(:\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield "house_rules.taste"
    for name in [each for each in sys.modules if each.startswith("house_rules")]:
        del sys.modules[name]


def question(prompt="Q?", id="p0", **row):
    return Question(prompt=prompt, messages=(), row=row, id=id)


HERE_AND_THERE = pytest.mark.parametrize("count", [0, 2])


@HERE_AND_THERE
def test_gets_prompt_response_and_row(rules, count):
    ranker = build_ranker(f"{rules}:good", workers=count)
    assert ranker.name == f"{rules}:good"
    questions = [question("four", "a", weight=10), question("", "b", weight=1)]
    scores = ranker.scores(questions, [["x", "xy"], ["xyz"]])
    assert [each.tolist() for each in scores] == [[14.0, 24.0], [3.0]]
    assert all(each.dtype == np.float64 for each in scores)


@HERE_AND_THERE
def test_cannot_change_the_row_of_the_next_candidate(rules, count):
    row = {"weight": 5}
    ranker = build_ranker(f"{rules}:spoils_its_row", workers=count)
    (scores,) = ranker.scores([Question("q", (), row, "p")], [["a", "b"]])
    assert scores.tolist() == [6.0, 6.0] and row == {"weight": 5}


@pytest.mark.parametrize("settings", [{}, {"vectorised": True}])
def test_cannot_change_a_list_of_the_next_candidate(rules, settings):
    row = {"given": [{"n": 5}]}
    name = "spoils_their_lists" if settings else "spoils_its_list"
    ranker = build_ranker(f"{rules}:{name}", workers=0, **settings)
    (scores,) = ranker.scores([Question("q", (), row, "p")], [["a", "b"]])
    assert scores.tolist() == [6.0, 6.0] and row == {"given": [{"n": 5}]}


def test_runs_in_as_many_processes_as_asked_and_by_default_in_one_of_its_own(rules):
    for settings, expected in [({"workers": 3}, 3), ({}, 1), ({"workers": 0}, 0)]:
        found = build_ranker(f"{rules}:who", **settings).scores([question()], [["x"] * 60])
        others = {int(pid) for pid in found[0]} - {os.getpid()}
        assert len(others) == expected
        for pid in others:
            with pytest.raises(ProcessLookupError):
                os.kill(pid, 0)


def test_order_is_kept_however_many_work(rules):
    texts = [["x" * i for i in range(j % 7)] for j in range(50)]
    questions = [question("", str(j), weight=1) for j in range(50)]
    for count in (1, 3):
        found = build_ranker(f"{rules}:good", workers=count).scores(questions, texts)
        assert [each.tolist() for each in found] == [[len(t) for t in each] for each in texts]


def test_nothing_to_judge_starts_nothing(rules):
    assert build_ranker(f"{rules}:good").scores([], []) == []
    assert build_ranker(f"{rules}:good").scores([question()], [[]])[0].shape == (0,)


@HERE_AND_THERE
@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("raises", "the rule raised KeyError: 'no_such_column'"),
        ("not_a_number", "the score is nan"),
    ],
)
def test_a_fault_names_rule_prompt_and_candidate(rules, name, what, count):
    path = f"{rules}:{name}"
    questions = [question(id="ok"), question(id="row-17")]
    with pytest.raises(FeedbackError) as caught:
        build_ranker(path, workers=count).scores(questions, [["fine"], ["fine", "fine", "bad"]])
    assert str(caught.value).startswith(f"ranker '{path}', prompt 'row-17', candidate 2: {what}")
    if name == "raises" and count:
        assert 'return row["no_such_column"]' in caught.value.__notes__[0]
    elif name == "raises":
        assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize(("name", "what"), [("nothing", "None"), ("word", "'7/10'")])
def test_what_is_no_number_is_shown(rules, name, what):
    with pytest.raises(FeedbackError, match=f"candidate 0: the score is {what}"):
        build_ranker(f"{rules}:{name}", workers=0).scores([question()], [["a"]])


def gone(pid):
    """Ended; its parent may not have looked yet."""
    try:
        with open(f"/proc/{pid}/stat") as f:
            return f.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(done, seconds=20):
    until = time.monotonic() + seconds
    while not done() and time.monotonic() < until:
        time.sleep(0.01)
    assert done()


def test_a_call_that_takes_too_long_is_stopped_with_all_it_started(rules, tmp_path):
    file = tmp_path / "pids.json"
    questions = [question(id="ok"), question(id="row-17", file=str(file))]
    ranker = build_ranker(f"{rules}:hangs", workers=2, timeout=0.5)
    began = time.monotonic()
    with pytest.raises(FeedbackError) as caught:
        ranker.scores(questions, [["fine"] * 5, ["fine", "bad " + "x" * 99]])
    assert time.monotonic() - began < 20
    text = str(caught.value)
    assert text.startswith(
        f"ranker '{rules}:hangs', prompt 'row-17', candidate 1: the rule took longer than 0.5 s"
    )
    assert f"begins 'bad {'x' * 56}'." in text
    for pid in json.loads(file.read_text()):
        wait_until(lambda pid=pid: gone(pid))


@pytest.mark.parametrize(
    ("name", "how"), [("dies", "signal 9; signal 9 often means"), ("leaves", "exit code 3")]
)
def test_a_process_that_dies_names_what_it_was_at(rules, name, how):
    with pytest.raises(FeedbackError, match=rf"prompt 'p0', candidate \d: .* died \({how}"):
        build_ranker(f"{rules}:{name}").scores([question()], [["fine", "bad"]])


def test_a_row_that_cannot_travel(rules):
    row = {"weight": 1, "hook": lambda: 0}
    ranker = build_ranker(f"{rules}:good")
    with pytest.raises(FeedbackError, match="'p', candidate 0: the row cannot be sent.*workers: 0"):
        ranker.scores([Question("q", (), row, "p")], [["a"]])
    here = build_ranker(f"{rules}:good", workers=0)
    assert here.scores([Question("q", (), row, "p")], [["a"]])[0].tolist() == [2.0]


def test_a_module_that_is_there_no_more(rules, tmp_path):
    ranker = build_ranker(f"{rules}:good")
    (tmp_path / "house_rules" / "taste.py").write_text("good = None\n")
    with pytest.raises(FeedbackError, match="is a NoneType; expected a Python function"):
        ranker.scores([question(weight=1)], [["a"]])


@pytest.mark.slow
def test_in_a_worker_jax_sees_the_cpu_alone(rules):
    assert build_ranker(f"{rules}:devices").scores([question()], [["a"]])[0].tolist() == [1.0]


ORPHAN = """
import sys
from selm_jax.feedback.ranker import Question, build_ranker
if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    row = {"file": sys.argv[2]}
    build_ranker("house_rules.taste:hangs").scores([Question("q", (), row, "p")], [["bad"]])
"""


def test_a_killed_run_leaves_no_process_behind(rules, tmp_path):
    script, file = tmp_path / "orphan.py", tmp_path / "pids.json"
    script.write_text(ORPHAN)
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path), str(file)])
    wait_until(lambda: file.exists() and file.read_text().endswith("]"), 60)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    for pid in json.loads(file.read_text()):
        wait_until(lambda pid=pid: gone(pid))


class TestVectorised:
    @HERE_AND_THERE
    def test_takes_lists_over_all_prompts(self, rules, count):
        ranker = build_ranker(f"{rules}:many", workers=count, vectorised=True, batch=4)
        questions = [question("", "a", weight=1), question("q", "b", weight=2)]
        found = ranker.scores(questions, [["", "x", "xx"], ["", "x", "xx"]])
        # four in the first call, two in the second
        assert [each.tolist() for each in found] == [
            [4100.0, 4110.0, 4120.0],
            [4201.0, 2211.0, 2221.0],
        ]

    def test_an_array_is_a_list(self, rules):
        ranker = build_ranker(f"{rules}:an_array", vectorised=True)
        assert ranker.scores([question()], [["a", "b"]])[0].tolist() == [0.0, 1.0]

    def test_too_few_and_a_bad_one(self, rules):
        with pytest.raises(FeedbackError, match=r"candidate 0, and 2 more: .*\[1.0, 1.0\].* of 3"):
            build_ranker(f"{rules}:too_few", workers=0, vectorised=True).scores(
                [question()], [["a", "b", "c"]]
            )
        with pytest.raises(FeedbackError, match="prompt 'p0', candidate 1: the score is inf"):
            build_ranker(f"{rules}:one_bad", vectorised=True).scores([question()], [["a", "bad"]])


class TestBuilding:
    @pytest.mark.parametrize(
        ("path", "what"),
        [
            ("house_rules.tast:good", "ModuleNotFoundError.*PYTHONPATH"),
            ("house_rules.taste:goood", "taste.py. has no 'goood'; did you mean 'good'"),
            ("house_rules.taste:not_a_function", "is a int; expected a Python function"),
            ("house_rules.taste:two", r"two\(prompt, response\); expected one"),
            ("house_rules.broken:f", "no_such_library_here"),
            ("house_rules.syntax:f", "SyntaxError"),
            ("house_rules.taste:", "expected the form 'package.module:function'"),
            (":good", "expected the form"),
            (".taste:good", "expected the form"),
            ("a:b:c", "expected the form"),
        ],
    )
    def test_bad_paths_are_found_when_the_ranker_is_built(self, rules, path, what):
        with pytest.raises(FeedbackError, match=what):
            build_ranker(path)

    @pytest.mark.parametrize(
        ("settings", "what"),
        [
            ({"workers": -1}, "workers is -1"),
            ({"workers": True}, "workers is True"),
            ({"workers": 0, "timeout": 5.0}, "cannot be stopped"),
            ({"timeout": 0.0}, "timeout is 0"),
            ({"timeout": float("nan")}, "timeout is nan"),
            ({"batch": 4}, "a batch only if"),
            ({"vectorised": True, "batch": 0}, "batch is 0"),
            ({"workrs": 1}, "unknown setting 'workrs'; did you mean 'workers'"),
            ({"path": "x:y"}, "unknown setting 'path'"),
        ],
    )
    def test_settings(self, rules, settings, what):
        with pytest.raises(FeedbackError, match=what):
            build_ranker(f"{rules}:good", **settings)

    def test_a_process_that_does_not_start(self, rules, monkeypatch):
        monkeypatch.setattr(workers, "_START_SECONDS", 0.0)
        with pytest.raises(FeedbackError, match="its process did not start within 0 s"):
            build_ranker(f"{rules}:good").scores([question()], [["a"]])
