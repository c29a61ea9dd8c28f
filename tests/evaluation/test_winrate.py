"""Who beats whom: the fit against another optimiser, the matrix against counting, faults injected."""

from __future__ import annotations

import itertools
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from rich.console import Console
from scipy.optimize import minimize
from tiny import PROMPTS

from selm_jax.evaluation import EvaluationError, winrate
from selm_jax.evaluation.answers import Asked, Stored, read, write
from selm_jax.evaluation.contestants import contestants
from selm_jax.evaluation.model import open_found
from selm_jax.feedback import ranker as rankers
from selm_jax.text.conversations import Message, Prompt

QUIET = Console(quiet=True)


def answers(texts, samples=1) -> list[Stored]:
    return [
        Stored(f"p{i}", (Message("user", PROMPTS[i]),), s, text * (s + 1))
        for i, text in enumerate(texts)
        for s in range(samples)
    ]


@pytest.fixture
def files(tmp_path):
    """Three files of answers to 30 prompts: long ones, short ones, and some of each."""
    rng = np.random.default_rng(0)
    size = {"long": (5, 9), "short": (1, 5), "mixed": (1, 9)}
    for name, (low, high) in size.items():
        texts = ["good " * int(n) for n in rng.integers(low, high, 30)]
        write(tmp_path / f"{name}.jsonl", answers(texts), name)
    return [str(tmp_path / f"{name}.jsonl") for name in size]


def compared(names, ranker, tmp_path, **more):
    found = contestants(names, iteration=None, revision=None, files=True)
    more = {"asked": Asked(1, 0, 6), "open_model": None, "prompts": None, "console": QUIET} | more
    return winrate.run(found, ranker=ranker, out=tmp_path / "out", keep=tmp_path / "kept", **more)


def test_the_matrix_is_a_count(files, tmp_path):
    report = compared(files, rankers.build("length", target=20), tmp_path)
    sets = [read(tmp_path / f"{n}.jsonl") for n in ("long", "short", "mixed")]
    score = rankers.build("length", target=20)
    for i, j in itertools.product(range(3), repeat=2):
        wins = []
        for a, b in zip(sets[i], sets[j], strict=True):
            x, y = score.scores([a.question], [[a.text, b.text]])[0]
            wins.append(0.5 if x == y else float(x > y))
        assert report["matrix"][i][j] == pytest.approx(np.mean(wins))
        both = report["length_controlled_matrix"]
        assert both[i][j] + both[j][i] == pytest.approx(1)
    assert any(p["ties"] > 0 for p in report["pairs"])
    lines = (tmp_path / "out" / "comparisons.jsonl").read_text().splitlines()
    assert len(lines) == 3 * 30
    with pytest.raises(EvaluationError, match="there already"):
        compared(files, score, tmp_path)


def test_the_fit_is_the_minimum_and_odd():
    rng = np.random.default_rng(1)
    lengths = rng.integers(10, 400, (200, 2)).astype(float)
    delta = lengths[:, 0] - lengths[:, 1]
    x = np.tanh(delta / delta.std(ddof=1))
    truth = 1 / (1 + np.exp(-(0.4 + 1.5 * x)))
    y = np.clip(truth + rng.normal(0, 0.1, 200), 0, 1)
    weights = rng.integers(0, 3, (4, 200)).astype(float)
    theta, phi = winrate.length_controlled(y, lengths, weights)

    for row, *found in zip(weights, theta, phi, strict=True):

        def loss(b, row=row):
            z = b[0] + b[1] * x
            return np.sum(row * (np.logaddexp(0, z) - y * z)) + 0.5 * np.dot(winrate.RIDGE, b**2)

        want = minimize(loss, np.zeros(2), tol=1e-12)
        np.testing.assert_allclose(found, want.x, atol=1e-4)
    back = winrate.length_controlled(1 - y, lengths[:, ::-1], weights)
    np.testing.assert_allclose(back[0], -theta, atol=1e-8)
    np.testing.assert_allclose(back[1], phi, atol=1e-8)
    assert abs(theta.mean() - 0.4) < 0.2 and abs(phi.mean() - 1.5) < 0.3


def test_wins_by_length_alone_are_none_at_equal_length():
    """A ranker that wants length and nothing else: raw says one wins, length-controlled does not."""
    rng = np.random.default_rng(2)
    one = answers(["x" * int(n) for n in rng.integers(40, 90, 48)])
    other = answers(["x" * int(n) for n in rng.integers(20, 80, 48)])
    y = np.array([float(len(a.text) > len(b.text)) for a, b in zip(one, other, strict=True)])
    found = winrate.compare(y, one, other, 0)
    raw, even = found["win_rate"]["mean"], found["length_controlled"]["mean"]
    assert raw > 0.7 and abs(even - 0.5) < 0.5 * (raw - 0.5)
    assert found["length_weight"] > 0.5


@pytest.mark.parametrize("y", [0.0, 0.5, 1.0])
def test_one_sided_shares_are_finite(y):
    same = answers(["word"] * 12)
    found = winrate.compare(np.full(12, y), same, same, 0)
    assert found["win_rate"]["mean"] == y
    assert 0 <= found["length_controlled"]["mean"] <= 1
    assert abs(found["length_controlled"]["mean"] - y) < 0.05


def test_samples_of_a_prompt_are_one_cluster():
    """A prompt's samples that say the same four times give the interval of one."""
    rng = np.random.default_rng(3)
    y = rng.integers(0, 2, 40).astype(float)
    once, often = answers(["ab"] * 40), answers(["ab"] * 40, 4)
    a = winrate.compare(y, once, once, 0)["win_rate"]
    b = winrate.compare(np.repeat(y, 4), often, often, 0)["win_rate"]
    assert a == pytest.approx(b)


class Moody:
    name = "moody"

    def __init__(self):
        self.rng = np.random.default_rng(0)

    def scores(self, questions, candidates):
        return [self.rng.normal(size=len(texts)) for texts in candidates]


def test_a_ranker_that_is_not_antisymmetric_stops(files, tmp_path):
    with pytest.raises(EvaluationError, match="not antisymmetric: at prompt"):
        compared(files, Moody(), tmp_path)
    assert not (tmp_path / "out").exists()


def spoiled(lines, how):
    rows = [json.loads(line) for line in lines]
    if how == "missing":
        del rows[3]
    elif how == "twice":
        rows.append(rows[3])
    elif how == "changed":
        rows[3]["messages"][0]["content"] = "Another question?"
    elif how == "no text":
        del rows[3]["text"]
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", r"no answer to 1 of 30 prompts .* 'p3'"),
        ("twice", "line 31: a second answer 0 to prompt 'p3'"),
        ("changed", "'p3' is not the same"),
        ("no text", "line 4: no answer: KeyError: 'text'"),
    ],
)
def test_bad_files_of_answers_are_named(files, tmp_path, how, says):
    file = tmp_path / "short.jsonl"
    file.write_text(spoiled(file.read_text().splitlines(), how))
    with pytest.raises(EvaluationError, match=says):
        compared(files, rankers.build("length", target=20), tmp_path)
    assert not (tmp_path / "out").exists()


class Judging(ThreadingHTTPServer):
    """An OpenAI-compatible server that prefers by `verdict(first, second)`; counts its requests."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, verdict):
        self.count = 0
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.count += 1
                first, second = body["messages"][-1]["content"].split("<<>>")[1:3]
                message = {"role": "assistant", "content": verdict(first, second)}
                reply = json.dumps(
                    {
                        "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                        "usage": {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": 10},
                    }
                ).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

            def log_message(self, *_):
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()


@pytest.mark.parametrize(
    ("verdict", "rate", "malformed"),
    [
        (lambda a, b: "[[A]]" if len(a) > len(b) else "[[B]]", 1.0, False),
        (lambda a, b: "[[A]]", 0.5, False),  # likes what comes first: its two orders disagree
        (lambda a, b: "Well, both have their merits.", 0.5, True),  # prose: a counted tie
    ],
)
def test_a_judge_is_asked_in_both_orders_and_not_twice(files, tmp_path, verdict, rate, malformed):
    server = Judging(verdict)
    template = tmp_path / "template.txt"
    template.write_text("{prompt}<<>>{response_a}<<>>{response_b}<<>>")
    judge = rankers.build(
        "judge", model="scripted", base_url=f"http://127.0.0.1:{server.server_port}/v1",
        template=str(template), cache=str(tmp_path / "cache.sqlite"), retries=0,
    )  # fmt: skip
    seen = Console(record=True, width=160)
    compared(files[:2], judge, tmp_path, dry_run=True, console=seen)
    assert server.count == 0 and not (tmp_path / "out").exists()
    assert " 60 " in seen.export_text()  # two orders of thirty prompts, at most
    report = compared(files[:2], judge, tmp_path)
    assert report["matrix"][0][1] == rate
    assert 0 < server.count <= 60
    # The second asking, the other way round, was answered from the cache.
    assert report["pairs"][0]["ranker"]["requests"] == 0
    assert (report["pairs"][0]["ranker"]["malformed"] > 0) == malformed


def test_a_models_answers_are_drawn_once(folders, files, tmp_path, monkeypatch):
    prompts = [Prompt(f"p{i}", (Message("user", PROMPTS[i]),)) for i in range(30)]
    names = [f"one={folders[0]}", files[0]]
    how = {
        "prompts": lambda: prompts,
        "open_model": lambda found: open_found(found, slots=8, console=QUIET),
    }
    first = compared(names, rankers.build("length", target=20), tmp_path, **how)
    monkeypatch.setattr("selm_jax.evaluation.model.Model.generate", None)  # to call it would fail
    (tmp_path / "out").rename(tmp_path / "before")
    assert compared(names, rankers.build("length", target=20), tmp_path, **how) == first


def test_who_is_compared_must_be_told_apart(files):
    with pytest.raises(EvaluationError, match="long stands there twice"):
        contestants([files[0], files[0]], iteration=None, revision=None, files=True)
    with pytest.raises(EvaluationError, match="no such file"):
        contestants(["x=gone.jsonl"], iteration=None, revision=None, files=True)
