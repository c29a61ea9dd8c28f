"""People as a ranker: questions, waiting and counts, and the command that serves the page."""

import json
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pytest
import tiny
from rich.console import Console

from selm_jax import cli, config
from selm_jax.annotate.store import AnnotationError, Annotations
from selm_jax.feedback.human import STORE, Human, human
from selm_jax.feedback.ranker import FeedbackError, Question, build_ranker, reported
from selm_jax.iterate import run_stage
from selm_jax.run.run import Run
from selm_jax.shell.artifacts import Stages
from selm_jax.stages.questions import put_questions
from selm_jax.text.prompts import Message


def question(number):
    return Question(f"Q{number}", (Message("user", f"Q{number}"),), {}, f"p{number}")


QUESTIONS = [question(i) for i in range(3)]
TEXTS = [["a", "b", "c"], ["same", "same"], ["x", "y", "x"]]  # the second asks nothing


def answer(store, batch, name="Ada", ranks=None):
    """Ranks every open question, the first stored answer best."""
    for digest in store.open_questions(batch, name):
        places = ranks or range(1, 1 + len(store.item(digest).answers))
        store.judge(digest, name, list(places), request=f"{name} {digest}", seconds=36.0)


class TestRanker:
    def test_works_with_what_has_arrived(self, tmp_path):
        ranker = build_ranker("human", wait=False)
        assert ranker.collect(tmp_path, "b", QUESTIONS, TEXTS) == [False, True, False]
        store = Annotations(tmp_path / STORE)
        assert [item.answers for item in store.items("b")] == [("a", "b", "c"), ("x", "y")]
        store.judge(store.items("b")[1].digest, "Ada", (2, 1), request="1", seconds=36.0)
        store.judge(store.items("b")[0].digest, "Ada", None, request="2", seconds=36.0)
        assert ranker.collect(tmp_path, "b", QUESTIONS, TEXTS) == [False, True, True]
        scores = ranker.scores(QUESTIONS[1:], TEXTS[1:])
        np.testing.assert_array_equal(scores[0], [0.5, 0.5])
        np.testing.assert_array_equal(scores[1], [0, 1, 0])  # equal texts, equal scores
        told = {"questions": 2, "rankings": 1, "skips": 1, "annotators": 1, "hours": 0.02}
        assert reported(ranker) == told

    def test_the_minimum_and_the_mean(self, tmp_path):
        ranker = human(wait=False, minimum=2)
        ranker.collect(tmp_path, "b", QUESTIONS[:1], TEXTS[:1])
        store = Annotations(tmp_path / STORE)
        answer(store, "b")
        assert ranker.collect(tmp_path, "b", QUESTIONS[:1], TEXTS[:1]) == [False]
        answer(store, "b", "Bob", ranks=(2, 1, 2))
        assert ranker.collect(tmp_path, "b", QUESTIONS[:1], TEXTS[:1]) == [True]
        (scores,) = ranker.scores(QUESTIONS[:1], TEXTS[:1])
        np.testing.assert_allclose(scores, [0.625, 0.75, 0.125])
        assert -1 <= reported(ranker)["alpha"] <= 1

    def test_waits_until_all_is_ranked_or_skipped(self, tmp_path):
        ranker, done, found = human(), [], []
        waiting = threading.Thread(
            target=lambda: found.append(
                ranker.collect(tmp_path, "b", QUESTIONS, TEXTS, done.append)
            )
        )
        waiting.start()
        while not done:
            time.sleep(0.01)
        store = Annotations(tmp_path / STORE)
        first, second = store.items("b")
        store.judge(first.digest, "Ada", (1, 2, 3), request="1")
        assert waiting.is_alive()
        store.judge(second.digest, "Ada", None, request="2")
        waiting.join(timeout=20)
        assert found == [[True, True, False]] and sum(done) == 2

    def test_refusals(self, tmp_path):
        with pytest.raises(FeedbackError, match="prompt 'p0': fewer than 1 people have ranked"):
            human().scores(QUESTIONS, TEXTS)
        with pytest.raises(FeedbackError, match="minimum is 0"):
            build_ranker("human", minimum=0)
        with pytest.raises(FeedbackError, match="wait is 'no'"):
            human(wait="no")
        assert isinstance(build_ranker("human", store=str(tmp_path / "s")), Human)


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """An experiment whose first iteration has its answers."""
    file = tiny.experiment(
        tmp_path_factory.mktemp("people"), data__heldout=None,
        feedback={"ranker": "human", "settings": {"wait": False}, "prompts_per_part": 1},
    )  # fmt: skip
    run_stage(Run(config.load(file), Console(quiet=True)), "generate", 1)
    return file


class TestStage:
    def counts(self, experiment):
        run = Run(config.load(experiment), Console(quiet=True))
        record = Stages(run.folder.iteration(1))
        entries = record.read()
        entries.pop("rank", None)
        record.file.write_text(json.dumps(entries))
        run_stage(run, "rank", 1)
        return run, record.read()["rank"]["counts"]

    def test_unlabelled_prompts_are_dropped_and_counted(self, experiment):
        run, counts = self.counts(experiment)
        assert counts["drops/not_answered"] == counts["ranker/questions"] > 0
        store, batch = put_questions(run, 1)
        answer(store, batch)
        run, counts = self.counts(experiment)
        assert counts["drops/not_answered"] == 0
        assert counts["ranker/rankings"] == counts["ranker/questions"]
        assert counts["ranker/annotators"] == 1  # what people did is told once, whatever a part is
        assert counts["explore/best"] == counts["pairs"] > 0  # the first stored is the greedy one

    def test_the_command_serves_exports_and_imports(
        self, experiment, tmp_path, monkeypatch, capsys
    ):
        folder = experiment.parent / "run"
        process = subprocess.Popen(
            [sys.executable, "-m", "selm_jax", "annotate", str(folder), "--port", "0"],
            stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            assert re.search("annotations.sqlite: [0-9]+ questions", process.stdout.readline())
            address = process.stdout.readline().strip()
            assert re.fullmatch("http://127.0.0.1:[0-9]+/[-_A-Za-z0-9]{32}/", address)
            assert b"Rank the answers" in urllib.request.urlopen(address, timeout=10).read()
        finally:
            process.kill()
        store, batch = put_questions(Run(config.load(experiment), Console(quiet=True)), 1)
        answer(store, batch)
        for arguments, said in (
            (["--export", str(tmp_path / "out.jsonl")], "out.jsonl: [0-9]+ rows, 0 all_equal"),
            (["--import", str(tmp_path / "out.jsonl")], "out.jsonl: [0-9]+ rows, [0-9]+ rankings"),
        ):
            monkeypatch.setattr(sys, "argv", ["selm", "annotate", str(folder), *arguments])
            cli.main()
            assert re.search(said, capsys.readouterr().out)

    def test_other_rankers_can_be_checked_by_people_too(self, experiment):
        run = Run(config.load(experiment, ["feedback={ranker: length}"]), Console(quiet=True))
        store, batch = put_questions(run, 1, minimum=2)
        assert store.items(batch)
        run = Run(config.load(experiment), Console(quiet=True))
        with pytest.raises(AnnotationError, match="waits for 1 people per prompt"):
            put_questions(run, 1, minimum=2)
