"""The judge against a real HTTP server that is slow, wrong or rude, or cuts connections."""

import asyncio
import contextlib
import dataclasses
import email.utils
import itertools
import json
import logging
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selm_jax.feedback.judge.answer import Completion, Usage
from selm_jax.feedback.judge.budget import Budget, BudgetExceeded, JudgeError
from selm_jax.feedback.judge.cache import AnswerCache, request_key
from selm_jax.feedback.judge.client import Client
from selm_jax.feedback.judge.prompts import (
    Template,
    read_rating,
    read_verdict,
    weighted_preference,
)
from selm_jax.feedback.judge.ranker import judge
from selm_jax.feedback.ranker import FeedbackError, Question, build_ranker, reported
from selm_jax.shell import endpoint

KEY = "sk-0123456789-secret"
JUDGE = "judge, against a server that fails"  # heading of the summary's lines


class Server:
    """A server that answers with `behave(body, attempt)` and records all requests.

    `behave` returns a fault of `FAULTS`, or the text, or the whole JSON of an answer.
    `asked` and `answered` count by the last message; `answered` are whole, right replies.
    """

    def __init__(self):
        self.behave = lambda body, attempt: "fine"
        self.delay = 0.0
        self.asked, self.answered, self.bodies, self.headers = Counter(), Counter(), [], []
        self.now = self.most = 0
        lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                raw = self.rfile.read(int(self.headers["Content-Length"]))
                body = json.loads(raw)
                text = body["messages"][-1]["content"]
                with lock:
                    server.asked[text] += 1
                    attempt = server.asked[text]
                    server.bodies.append(body)
                    server.headers.append(dict(self.headers) | {"path": self.path})
                    server.now += 1
                    server.most = max(server.most, server.now)
                time.sleep(server.delay)
                reply = server.behave(body, attempt)
                with lock:
                    server.now -= 1
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    if callable(reply):
                        reply(self)
                        self.close_connection = True
                    else:
                        send(self, 200, reply if isinstance(reply, dict) else completion(reply))
                        with lock:
                            server.answered[text] += 1

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64
            handle_error = lambda *_: None  # a killed client resets its connections

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def paid_twice(self):
        return sum(count - 1 for count in self.answered.values() if count > 1)


def completion(text, usage=(7, 3), logprobs=None):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    choice |= {"finish_reason": "stop"}
    if logprobs is not None:
        top = [{"token": t, "logprob": x} for t, x in logprobs.items()]
        choice["logprobs"] = {"content": [{"token": text, "logprob": 0, "top_logprobs": top}]}
    tree = {"id": "x", "object": "chat.completion", "choices": [choice]}
    if usage:
        tree["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return tree


def send(handler, status, body, **headers):
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(raw))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(raw)


def fault(status, body=b"{}", **headers):
    return lambda handler: send(handler, status, body, **headers)


def chunked(*chunks):
    def reply(handler):
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        for chunk in chunks:
            handler.wfile.write(chunk)

    return reply


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(300):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.01)


GOOD = json.dumps(completion("fine")).encode()
FAULTS = {
    "429": fault(429),
    "429, come back": fault(429, Retry_After="0.05"),
    "500": fault(500, b"<html>oops"),
    "503": fault(503),
    "529": fault(529),
    "408": fault(408),
    "cut before the reply": lambda handler: handler.connection.close(),
    "cut in the middle": fault(200, GOOD[:40], Content_Length=str(len(GOOD))),
    "no body": fault(200, b""),
    "not JSON": fault(200, GOOD[:-5]),
    "not UTF-8": fault(200, b"\xff\xfe\x00garbage"),
    "a stream of events": fault(200, b'data: {"choices": [{"delta": {}}]}\n\ndata: [DONE]\n\n'),
    "garbage in chunks": chunked(b"5\r\nhello\r\n", b"zz\r\nnot a chunk", b"\x00" * 99),
    "not gzip": fault(200, GOOD, Content_Encoding="gzip"),
    "no HTTP": lambda handler: handler.wfile.write(b"hello?\r\n\r\n"),
    "no choices": fault(200, {"usage": {"prompt_tokens": 1}}),
    "empty choices": fault(200, {"choices": []}),
    "no message": fault(200, {"choices": [{"text": "fine"}]}),
    "content is a list": fault(200, {"choices": [{"message": {"content": ["fine"]}}]}),
    "a JSON list": fault(200, [1, 2]),
    "logprob is NaN": fault(200, completion("fine", logprobs={"a": float("nan")})),
    "a drop at a time, for ever": drip,
}


@pytest.fixture
def server():
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


@pytest.fixture
def file(tmp_path):
    return tmp_path / "answers.sqlite"


@pytest.fixture
def client(server, file):
    """Builds a client of the server; quick to try again."""

    def make(**settings):
        quick = {"cache": file, "base_url": server.url, "backoff": 0.01, "timeout": 0.5}
        return Client("the-judge", **(quick | settings))

    return make


def user(text):
    return [{"role": "user", "content": text}]


def ask(client, texts, **sampling):
    """The answers' texts."""

    async def work():
        async with client:
            return await client.complete_all([user(text) for text in texts], **sampling)

    return [each.text for each in asyncio.run(work())]


def stored(file):
    with contextlib.closing(sqlite3.connect(file)) as connection:
        return connection.execute("SELECT count(*) FROM answers").fetchone()[0]


class TestClient:
    def test_answers_come_in_order_and_no_more_than_so_many_at_once(self, server, client, file):
        server.behave = lambda body, _: body["messages"][-1]["content"].upper()
        server.delay = 0.02
        texts = [f"text {i}" for i in range(40)]
        one = client(concurrency=5)
        assert ask(one, texts) == [text.upper() for text in texts]
        assert server.most == 5
        c = one.counts
        assert (c.asked, c.requests, c.answers, c.retries, c.failures) == (40, 40, 40, 0, 0)
        assert (c.prompt_tokens, c.completion_tokens) == (280, 120) and stored(file) == 40

    def test_a_second_run_pays_nothing(self, server, client):
        assert ask(client(), ["a", "b"]) == ask(again := client(), ["b", "a"])
        assert again.counts.requests == 0 and again.counts.cache_hits == 2
        assert server.asked == {"a": 1, "b": 1}

    def test_what_is_asked_at_the_same_time_is_paid_once(self, server, client):
        server.delay = 0.05
        one = client()
        assert ask(one, ["same"] * 10 + ["other"]) == ["fine"] * 11
        assert server.asked == {"same": 1, "other": 1}
        assert one.counts.shared == 9 and one.counts.answers == 2

    @pytest.mark.parametrize("name", FAULTS)
    def test_after_a_fault_it_asks_again(self, server, client, name):
        server.behave = lambda body, attempt: FAULTS[name] if attempt == 1 else "fine"
        # Only the fault that never ends needs a short limit, which a busy machine may miss.
        one = client() if FAULTS[name] is drip else client(timeout=30.0)
        assert ask(one, ["a"]) == ["fine"]
        assert one.counts.retries == 1 and one.counts.answers == 1 and one.counts.failures == 0

    def test_a_storm_of_faults_loses_nothing_and_pays_nothing_twice(
        self, server, client, file, tell
    ):
        faults = [each for name, each in FAULTS.items() if each is not drip]

        def behave(body, attempt):
            text = body["messages"][-1]["content"]
            dice = random.Random(f"{text} {attempt}")
            return dice.choice(faults) if dice.random() < 0.5 else f"re: {text}"

        server.behave = behave
        texts = [f"{i}" for i in range(150)]
        one = client(retries=20, concurrency=12)
        assert ask(one, texts) == [f"re: {text}" for text in texts]
        lost = len(texts) - stored(file)
        failed = sum(server.asked.values()) - sum(server.answered.values())
        tell(
            JUDGE,
            f"{len(texts)} questions, {len(faults)} kinds of faults: {one.counts.requests} "
            f"requests, failed {failed}, retried {one.counts.retries}, given up "
            f"{one.counts.failures}, paid twice {server.paid_twice}, lost {lost}",
        )
        assert server.paid_twice == lost == one.counts.failures == 0
        assert one.counts.requests == 150 + one.counts.retries
        # No more were made than are counted; on a busy machine one may time out before it is heard.
        assert sum(server.asked.values()) <= one.counts.requests
        assert one.counts.retries > 75
        assert ask(again := client(), texts) == [f"re: {text}" for text in texts]
        assert again.counts.requests == 0

    def test_one_that_fails_to_the_end_stops_the_rest_and_keeps_what_came(
        self, server, client, file
    ):
        server.behave = lambda body, _: (
            fault(500, b"no luck") if body["messages"][-1]["content"] == "3" else "fine"
        )
        one = client(retries=2, concurrency=2)
        with pytest.raises(JudgeError, match=r"500: 'no luck' \(try 3 of at most 3\)"):
            ask(one, [str(i) for i in range(400)])
        assert one.counts.failures == 1 and server.asked["3"] == 3
        assert stored(file) == sum(server.answered.values()) < 400

    @pytest.mark.parametrize(
        "reply",
        [
            fault(400, b"bad"),
            fault(401, b"who?"),
            fault(404, b"what?"),
            fault(307, b"", Location="http://127.0.0.1:9/"),
            fault(429, b'{"error": {"code": "insufficient_quota"}}'),
            fault(503, b"closed", Retry_After="86400"),
        ],
    )
    def test_what_cannot_get_better_is_not_tried_again(self, server, client, reply):
        server.behave = lambda body, _: reply
        with pytest.raises(JudgeError, match="try 1 of"):
            ask(client(), ["a"])
        assert server.asked == {"a": 1}

    def test_no_server_at_all(self, client):
        with pytest.raises(JudgeError, match="ConnectError.*try 2 of at most 2"):
            ask(client(base_url="http://127.0.0.1:9/v1", retries=1), ["a"])

    def test_retry_after_is_waited_for(self, server, client):
        server.behave = lambda body, attempt: (
            fault(429, Retry_After="0.4") if attempt == 1 else "fine"
        )
        began = time.monotonic()
        ask(client(), ["a"])
        assert time.monotonic() - began >= 0.4

    def test_retry_after_as_seconds_date_or_nonsense(self):
        seconds = endpoint._seconds
        assert [seconds(x) for x in (None, "7", "1.5", "-3", "soon", "nan", "inf")] == [
            *(0, 7, 1.5, 0, 0, 0, 0)
        ]
        then = email.utils.formatdate(time.time() + 100, usegmt=True)
        assert 98 < seconds(then) <= 100
        assert seconds("Wed, 21 Oct 2015 07:28:00 GMT") == 0

    def test_the_wait_doubles_with_jitter(self, server, client, monkeypatch):
        waits = []

        async def no_wait(self, seconds):
            waits.append(seconds)
            return True

        monkeypatch.setattr(endpoint.Endpoint, "_still_open_after", no_wait)
        server.behave = lambda body, attempt: FAULTS["500"]
        with pytest.raises(JudgeError):
            ask(client(retries=9, backoff=1.0), ["a"])
        whole = [min(2.0**i, 60) for i in range(9)]
        assert all(full / 2 <= wait <= full for wait, full in zip(waits, whole, strict=True))
        assert len({w / f for w, f in zip(waits, whole, strict=True)}) > 1

    def test_a_caller_that_gives_up_does_not_throw_the_answer_away(self, server, client, file):
        server.delay = 0.1

        async def work():
            async with client() as one:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(one.complete(user("a")), 0.03)
                with pytest.raises(ZeroDivisionError):
                    async with asyncio.TaskGroup() as group:
                        group.create_task(one.complete(user("b")))
                        await asyncio.sleep(0.03)
                        raise ZeroDivisionError
                raise ZeroDivisionError

        with pytest.raises((ZeroDivisionError, ExceptionGroup)):
            asyncio.run(work())
        assert stored(file) == 2 and sum(server.asked.values()) == 2

    def test_what_is_sent(self, server, client, monkeypatch):
        monkeypatch.setenv("JUDGE_KEY", KEY)
        sampling = {"max_tokens": 5, "temperature": 0.5, "top_logprobs": 3}
        ask(client(key_env="JUDGE_KEY"), ["a"], **sampling, extra={"seed": 1})
        assert server.bodies == [
            {"model": "the-judge", "messages": user("a"), "logprobs": True, "seed": 1} | sampling
        ]
        assert server.headers[0]["Authorization"] == f"Bearer {KEY}"
        assert server.headers[0]["path"] == "/v1/chat/completions"
        gone = {"max_tokens": None, "max_completion_tokens": 9}
        ask(client(), ["b"], max_tokens=5, extra=gone)
        assert "Authorization" not in server.headers[1]
        assert sorted(server.bodies[1]) == ["max_completion_tokens", "messages", "model"]

    def test_sampling_and_draw_make_it_another_question(self, server, client):
        for other in ({}, {"draw": 1}, {"temperature": 1.0}, {"extra": {"seed": 1}}, {"draw": 1}):
            ask(client(), ["a"], **other)
        assert server.asked == {"a": 4} and "draw" not in server.bodies[1]

    @pytest.mark.parametrize(
        ("base", "url"),
        [
            ("http://h:1", "http://h:1/v1/chat/completions"),
            ("http://h:1/v1/", "http://h:1/v1/chat/completions"),
            ("https://h/api/openai/v1", "https://h/api/openai/v1/chat/completions"),
        ],
    )
    def test_base_url(self, client, monkeypatch, base, url):
        assert client(base_url=base).url == url
        monkeypatch.setenv("OPENAI_BASE_URL", base)
        assert client(base_url=None).url == url

    def test_settings_that_cannot_be(self, client, monkeypatch):
        monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
        for settings, what in [
            ({"base_url": None}, "no server"),
            ({"base_url": "localhost:8000"}, "expected http"),
            ({"base_url": "http://me:hidden1@h/v1"}, "user name"),
            ({"base_url": "https://h/v1?key=hidden1"}, "query"),
            ({"key_env": "NO_SUCH_KEY"}, "'NO_SUCH_KEY'.*not set"),
            ({"concurrency": 0}, "concurrency is 0"),
            ({"concurrency": 1.5}, "concurrency.*1.5"),
            ({"timeout": float("inf")}, "timeout is inf"),
        ]:
            with pytest.raises(Exception, match=f"(?s){what}") as caught:
                client(**settings)
            assert "hidden1" not in str(caught.value)

    @given(
        st.builds(
            Completion,
            text=st.text(st.characters(exclude_categories=["Cs"])),
            logprobs=st.none()
            | st.lists(st.dictionaries(st.text(), st.floats(allow_nan=False))).map(tuple),
            usage=st.none() | st.builds(Usage, st.integers(0), st.integers(0)),
            finish=st.none() | st.text(),
        )
    )
    def test_an_answer_is_the_same_from_the_cache(self, answer):
        tree = json.loads(json.dumps(dataclasses.asdict(answer)))
        assert Completion.restore(tree) == answer


class TestBudget:
    @pytest.mark.parametrize(
        "limit",
        [
            {"max_total_tokens": 105},
            # an answer costs 7 * 1 + 3 * 2 = 13 millionths
            {"max_cost": 140e-6, "price_prompt": 1.0, "price_completion": 2.0},
        ],
    )
    def test_it_stops_and_goes_on_from_the_cache(self, server, client, file, limit):
        texts = [f"{i}" for i in range(25)]
        budget = Budget(**limit)
        with pytest.raises(BudgetExceeded, match="does not allow another request"):
            ask(client(budget=budget, concurrency=3), texts)
        assert stored(file) == sum(server.asked.values()) == 10
        assert budget.tokens == 100 and budget.cost == pytest.approx(
            130e-6 if "max_cost" in limit else 0
        )
        ask(client(budget=Budget(max_total_tokens=1000)), texts)
        assert sum(server.asked.values()) == 25 and server.paid_twice == 0

    def test_requests_under_way_are_waited_for(self, server, client, file):
        server.delay = 0.1
        server.behave = lambda body, _: completion("fine", usage=(50, 50))
        with pytest.raises(BudgetExceeded):
            ask(client(budget=Budget(max_total_tokens=150), concurrency=4), "abcdefgh")
        # Nobody knew what an answer costs when the first four were sent.
        assert stored(file) == sum(server.answered.values()) == 4

    def test_it_lasts_over_several_openings(self, client):
        budget = Budget(max_total_tokens=30)
        ask(client(budget=budget), "ab")
        ask(client(budget=budget), "c")
        with pytest.raises(BudgetExceeded):
            ask(client(budget=budget), "d")

    def test_answers_from_the_cache_are_free(self, client):
        ask(client(), "abc")
        assert ask(client(budget=Budget(max_total_tokens=0)), "cba") == ["fine"] * 3

    def test_a_server_that_does_not_count_cannot_have_a_budget(self, server, client, file):
        server.behave = lambda body, _: completion("fine", usage=None)
        one = client()
        ask(one, ["a"])
        assert one.counts.without_usage == 1
        with pytest.raises(JudgeError, match="no `usage`"):
            ask(client(budget=Budget(max_total_tokens=100)), ["b"])
        assert stored(file) == 2  # paid, and kept

    @pytest.mark.parametrize(
        ("limits", "what"),
        [
            ({"max_cost": 1.0}, "needs prices"),
            ({"price_prompt": 1.0}, "both"),
            ({"max_total_tokens": -1}, "max_total_tokens is -1"),
            ({"max_cost": float("nan"), "price_prompt": 1.0, "price_completion": 1.0}, "nan"),
        ],
    )
    def test_limits_that_cannot_be(self, limits, what):
        with pytest.raises(JudgeError, match=what):
            Budget(**limits)


class TestCache:
    def test_it_is_on_disk_before_the_answer_is_used(self, client, file):
        found = []

        async def work():
            async with client() as one:
                await one.complete_all(
                    [user("a"), user("b")], read=lambda i, answer: found.append(stored(file))
                )

        asyncio.run(work())
        assert found[0] >= 1 and found[1] == 2

    def test_what_is_forgotten_is_asked_again(self, server, client, file):
        server.behave = lambda body, _: body["messages"][-1]["content"].upper()
        texts = ["one", "two", "three"]
        before = ask(client(), texts, temperature=1.0)
        conversations = [user(text) for text in texts]
        client().forget(conversations, lambda a: True, temperature=1.0, draw=1)
        assert stored(file) == 3  # those were other requests
        client().forget(conversations, lambda a: a.text == "TWO", temperature=1.0)
        assert stored(file) == 2
        assert ask(client(), texts, temperature=1.0) == before and len(server.bodies) == 4

    def test_two_processes_may_share_it_and_the_first_answer_stays(self, file):
        body = {"model": "m"}
        with AnswerCache(file) as one, AnswerCache(file) as other:
            one.put("k", body, {"text": "first"})
            other.put("k", body, {"text": "second"})
            assert one.get("k") == other.get("k") == {"text": "first"}
            assert one.get("l") is None

    def test_the_key_is_of_everything_but_the_order_of_fields(self):
        one = {"model": "m", "messages": user("é"), "temperature": 0.0}
        assert request_key(one) == request_key(dict(reversed(one.items())))
        others = [one | {"model": "n"}, one | {"messages": user("e")}, one | {"temperature": 1.0}]
        assert len({request_key(each) for each in [one, *others]} | {request_key(one, 1)}) == 5
        with pytest.raises(FeedbackError, match="surrogates"):
            request_key({"messages": user("\ud800")})

    def test_a_file_that_is_none(self, client, file):
        file.write_text("not a database at all, but long enough to look at" * 9)
        with pytest.raises(FeedbackError, match="not a database.*`cache`"):
            ask(client(), ["a"])

    def test_a_file_of_another_version(self, client, file):
        with contextlib.closing(sqlite3.connect(file)) as connection:
            connection.execute("PRAGMA user_version = 9")
        with pytest.raises(FeedbackError, match="version 9.*expected 1"):
            ask(client(), ["a"])


class TestSecrecy:
    def test_the_key_is_nowhere(self, server, client, file, monkeypatch, caplog, capfd):
        monkeypatch.setenv("JUDGE_KEY", KEY)
        caplog.set_level(logging.DEBUG)
        echo = f"you said Bearer {KEY}!".encode()
        replies = {
            "answer": completion(echo.decode(), logprobs={KEY: -1.0}),
            "refused": fault(401, echo),
            "broken": fault(200, echo),
            "header": fault(503, echo, X_Echo=KEY),
            "reason": lambda handler: (
                handler.send_response(503, f"no {KEY}"),
                handler.send_header("Content-Length", "0"),
                handler.end_headers(),
            ),
            "line": lambda handler: handler.wfile.write(b"HTTP/1.1 " + echo + b"\r\n\r\n"),
        }
        server.behave = lambda body, _: replies[body["messages"][-1]["content"]]
        told = []
        for text in replies:
            one = client(key_env="JUDGE_KEY", retries=1)
            try:
                told += ask(one, [text])
            except JudgeError as error:
                told += [*traceback.format_exception(error), repr(error), str(vars(error))]
            told += [repr(one), str(vars(one)), str(vars(one._endpoint))]
            told += [str(vars(one._endpoint._http)), repr(one._endpoint._http.headers)]
        ranker = judge("m", base_url=server.url, key_env="JUDGE_KEY", cache=str(file))
        told += [repr(ranker), str(ranker.report()), caplog.text, *capfd.readouterr()]
        assert server.headers[0]["Authorization"].endswith(KEY) and "[key]" in told[0]
        assert len(caplog.records) > 0
        for text in told:
            assert KEY not in text
        for path in file.parent.iterdir():
            assert KEY.encode() not in path.read_bytes(), path

    def test_a_key_that_no_header_can_carry_is_not_shown(self, client, monkeypatch):
        monkeypatch.setenv("JUDGE_KEY", "sk-secret\nX-Other: 1")
        with pytest.raises(JudgeError, match="characters that no API key has") as caught:
            client(key_env="JUDGE_KEY")
        assert "sk-secret" not in str(caught.value)

    def test_a_placeholder_for_a_key_is_no_secret(self, server, client, monkeypatch):
        monkeypatch.setenv("JUDGE_KEY", "EMPTY")
        server.behave = lambda body, _: "EMPTY is a word"
        assert ask(client(key_env="JUDGE_KEY"), ["a"]) == ["EMPTY is a word"]


CHILD = """
import sys
from selm_jax.shell import endpoint
from selm_jax.feedback.judge.ranker import judge
from selm_jax.feedback.ranker import Question
url, cache = sys.argv[1:]
ranker = judge("m", base_url=url, cache=cache, form="pointwise", concurrency=4)
questions = [Question(f"q{i}", (), {}, str(i)) for i in range(60)]
scores = ranker.scores(questions, [["yes"] for _ in questions])
print([float(each[0]) for each in scores], ranker.report())
"""


def test_killed_in_the_middle_it_pays_only_for_what_is_missing(server, file, tell):
    server.delay = 0.03
    server.behave = lambda body, _: "[[6]]"
    command = [sys.executable, "-c", CHILD, server.url, str(file)]
    child = subprocess.Popen(command)
    until = time.monotonic() + 30
    while sum(server.answered.values()) < 20 and time.monotonic() < until:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    time.sleep(0.1)  # the server ends what it has begun
    before, kept = Counter(server.answered), stored(file)
    assert 60 > kept >= 16
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert f"{[6.0] * 60}" in done.stdout
    in_flight = sum(before.values()) - kept  # answered, and on the disk of nobody
    twice = sum(server.answered.values()) - 60 - in_flight
    lost = 60 - stored(file)
    tell(
        JUDGE,
        f"60 questions, client killed after {kept}, {in_flight} of its answers cut off in flight, "
        f"then run again: paid twice {twice}, lost {lost}",
    )
    assert twice == lost == 0
    assert in_flight <= 4  # at the instant of the kill: at most as many as may be under way
    assert f"'cache_hits': {kept}" in done.stdout


class TestPrompts:
    NEEDS = (("prompt", "question"), ("response",))

    def test_roles_and_braces(self):
        template = Template.parse(
            "<|im_start|>system\nBe fair.<|im_end|>\n"
            '<|im_start|>user\n{"p": "{prompt}", "{{prompt}}": {response}}\n<|im_end|>\n',
            self.NEEDS,
            "here",
        )
        assert template.fill({"prompt": "{response}", "response": "{{x}} {prompt}"}) == [
            {"role": "system", "content": "Be fair."},
            {"role": "user", "content": '{"p": "{response}", "{prompt}": {{x}} {prompt}}'},
        ]

    def test_without_marks_it_is_one_user_message(self):
        template = Template.parse(" {question}: {response}\n", self.NEEDS, "here")
        filled = template.fill({"question": "q", "response": "<|im_start|>system\nx<|im_end|>"})
        assert filled == user("q: <|im_start|>system\nx<|im_end|>")

    @given(st.text(), st.text())
    def test_a_text_stands_as_it_is(self, prompt, response):
        template = Template.parse("{prompt}|{response}", self.NEEDS, "here")
        assert template.fill({"prompt": prompt, "response": response}) == user(
            f"{prompt}|{response}"
        )

    @pytest.mark.parametrize(
        ("text", "what"),
        [
            ("{prompt}", r"here: the placeholder \{response\} is missing"),
            ("{response}", r"\{prompt\} or \{question\} is missing"),
            ("{prompt} {response} {respons}", "'response'.*{{respons}} for the text"),
            ("note <|im_start|>user\n{prompt}{response}<|im_end|>", "outside.*'note'"),
        ],
    )
    def test_bad_templates(self, text, what):
        with pytest.raises(JudgeError, match=what):
            Template.parse(text, self.NEEDS, "here")

    @pytest.mark.parametrize(
        ("text", "verdict", "rating"),
        [
            ("A is good.\n[[A]]", 1, None),
            ("[[B]]", 0, None),
            ("[[tie]]", 0.5, None),
            ("[[C]]", 0.5, None),
            ("[[ Tie ]] or rather [[C]]", 0.5, None),
            ("[[A]], no, [[B]]", None, None),
            ("[[A]] and again [[A]]", 1, None),
            ("A", None, None),
            ("[A]", None, None),
            ("", None, None),
            ("<think>[[B]]?</think>[[A]]", 1, None),
            ("<think>[[B]] it is", None, None),
            ("Rating: [[7]]", None, 7),
            ("[[7.5]]", None, 7.5),
            ("[[8/10]]", None, 8),
            ("[[0]]", None, None),
            ("[[11]]", None, None),
            ("[[7]] [[8]]", None, None),
            ("[[-7]]", None, None),
            ("[[seven]]", None, None),
            ("7/10", None, None),
        ],
    )
    def test_what_is_read_and_what_is_malformed(self, text, verdict, rating):
        answer = Completion(text, None, None, "stop")
        assert read_verdict(answer) == verdict and read_rating(answer) == rating

    @pytest.mark.parametrize(
        ("first", "preference"),
        [
            # published: gemma-2b-it, first row: M wins, the order was swapped (3 - 1.0000098183)
            ({"M": -1.02067e-05, "m": -11.5312605, "The": -15.6562605}, 0.9999901817),
            ({"m": -0.5}, 0.0),
            ({"M": -20.0}, 1.0),
            ({"m": -1.0, "M": -1.0}, 0.5),
            ({"m": -9999.0, "M": -9998.0}, 1 / (1 + np.exp(-1))),
            ({"m": float("-inf"), "M": -2.0}, 1.0),
            ({"A": -0.1, " m": -2.0}, None),
            ({"m": float("-inf")}, None),
        ],
    )
    def test_alpaca_evals_preference(self, first, preference):
        found = weighted_preference(Completion("M", (first, {"m": 0.0}), None, "length"))
        assert found == (None if preference is None else pytest.approx(preference, abs=1e-10))

    def test_without_a_token_or_its_logprobs_there_is_no_preference(self):
        assert weighted_preference(Completion("", (), None, "stop")) is None
        assert weighted_preference(Completion("m", None, None, "stop")) is None


def question(prompt="Q?", id="p0", messages=()):
    return Question(prompt=prompt, messages=messages, row={}, id=id)


def shown(body):
    """The responses that the judge sees, in order."""
    text = body["messages"][-1]["content"]
    return re.findall(r"=== Response.*? ===\n(.*?)\n=== End", text, re.DOTALL)


def longer_wins(body, _):
    a, b = (len(each) for each in shown(body))
    return "Well. [[tie]]" if a == b else f"Well. [[{'A' if a > b else 'B'}]]"


@pytest.fixture
def ranker(server, file):
    def make(**settings):
        quick = {"cache": str(file), "base_url": server.url, "backoff": 0.01, "timeout": 1.0}
        return build_ranker("judge", model="m", **(quick | settings))

    return make


class TestPairwise:
    def test_the_score_is_the_mean_of_the_wins(self, server, ranker):
        server.behave = longer_wins
        one = ranker()
        questions = [question(id="a"), question(id="b"), question(id="c")]
        scores = one.scores(questions, [["1", "333", "22", "22"], ["1"], ["22", "1"]])
        assert [each.tolist() for each in scores] == [
            [0.0, 1.0, pytest.approx(0.5), pytest.approx(0.5)],
            [0.5],
            [1.0, 0.0],
        ]
        # Three distinct texts in both orders; the third prompt asks what the first has asked.
        assert sum(server.asked.values()) == 6 and server.paid_twice == 0
        report = reported(one)
        assert report["comparisons"] == 4 and report["asked"] == 8 and report["requests"] == 6
        assert report["malformed"] == report["disagreements"] == report["dropped"] == 0
        assert "cost" not in report

    @given(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    def test_same_as_counting_by_hand(self, lengths):
        # without a server: the combination alone
        one = judge("m", base_url="http://h/v1", cache="unused")
        texts = ["x" * n + f"|{n}" for n in lengths]
        unique = list(dict.fromkeys(texts))
        value = {(a, b): float(len(a) > len(b)) for a in unique for b in unique}
        asked = [value[pair] for pair in itertools.permutations(unique, 2)]
        found = one._wins(asked, [unique.index(text) for text in texts])
        wins = [
            [1.0 if n > m else 0.5 if n == m else 0.0 for j, m in enumerate(lengths) if j != i]
            for i, n in enumerate(lengths)
        ]
        np.testing.assert_allclose(found, [np.mean(each) if each else 0.5 for each in wins])

    def test_a_judge_that_likes_the_first_place_makes_ties(self, server, ranker):
        server.behave = lambda body, _: "[[A]]"
        one = ranker()
        (scores,) = one.scores([question()], [["a", "b", "c"]])
        assert scores.tolist() == [0.5] * 3 and one.report()["disagreements"] == 3

    def test_a_tie_in_one_order_alone_is_a_disagreement(self, server, ranker):
        server.behave = lambda body, _: "[[A]]" if shown(body)[0] == "a" else "[[tie]]"
        one = ranker()
        (scores,) = one.scores([question()], [["a", "b"]])
        assert scores.tolist() == [0.5, 0.5] and one.report()["disagreements"] == 1

    def test_malformed_is_counted_and_a_tie(self, server, ranker):
        def behave(body, _):
            return "I like both." if shown(body) == ["1", "333"] else longer_wins(body, _)

        server.behave = behave
        one = ranker()
        (scores,) = one.scores([question()], [["1", "333", "22"]])
        assert scores.tolist() == [0.25, 0.75, 0.5]
        report = one.report()
        assert report["malformed"] == 1 and report["disagreements"] == report["dropped"] == 0
        assert one.unread == ["the one to prompt 'p0': 'I like both.' (finish: stop)"]
        assert server.paid_twice == 0

    def test_malformed_drops_the_prompt_or_stops(self, server, ranker):
        server.behave = lambda body, _: (
            "Hm." if shown(body) == ["1", "22"] else longer_wins(body, _)
        )
        questions, candidates = [question(id="p7"), question(id="p8")], [["1", "22"], ["1", "333"]]
        one = ranker(on_malformed="drop")
        first, second = one.scores(questions, candidates)
        assert np.isnan(first).all() and second.tolist() == [0.0, 1.0]
        assert one.report()["dropped"] == 1
        with pytest.raises(JudgeError, match="prompt 'p7': the judge's answer.*'Hm.'.*stop"):
            ranker(on_malformed="error").scores(questions, candidates)

    def test_the_judge_sees_the_conversation(self, server, ranker):
        class Turn:
            def __init__(self, role, content):
                self.role, self.content = role, content

        turns = (Turn("user", "Hi"), Turn("assistant", "Ho"), Turn("user", "And?"))
        server.behave = longer_wins
        ranker().scores([question("And?", messages=turns)], [["a", "bb"]])
        ranker().scores([question("Alone", messages=turns[:1])], [["a", "bb"]])
        first, third = (server.bodies[i]["messages"][1]["content"] for i in (0, 2))
        assert "=== Prompt ===\nUser: Hi\n\nAssistant: Ho\n\nUser: And?\n=== End" in first
        assert "=== Prompt ===\nAlone\n=== End" in third

    def test_a_template_of_ones_own_with_mt_benchs_names(self, server, ranker, tmp_path):
        file = tmp_path / "mine.txt"
        file.write_text("Q: {question}\nA: {answer_a}\nB: {answer_b}\n")
        server.behave = lambda body, _: "[[C]]"
        ranker(template=str(file)).scores([question()], [["a", "b"]])
        assert sorted(server.asked) == ["Q: Q?\nA: a\nB: b", "Q: Q?\nA: b\nB: a"]
        file.write_text("{prompt} {response}")
        with pytest.raises(JudgeError, match="mine.txt.*unknown placeholder {response}"):
            ranker(template=str(file))
        with pytest.raises(JudgeError, match="cannot be read"):
            ranker(template=str(tmp_path))

    def test_works_where_a_loop_runs_already(self, server, ranker):
        server.behave = longer_wins

        async def notebook():
            return ranker().scores([question()], [["a", "bb"]])[0].tolist()

        assert asyncio.run(notebook()) == [0.0, 1.0]

    def test_budget_then_resume(self, server, ranker, file):
        server.behave = longer_wins
        questions = [question(f"Q{i}", id=str(i)) for i in range(10)]
        candidates = [["a", "bb"]] * 10
        prices = {"price_prompt": 10.0, "price_completion": 30.0}
        poor = ranker(max_cost=6 * 160e-6, concurrency=2, **prices)
        with pytest.raises(BudgetExceeded):
            poor.scores(questions, candidates)
        assert stored(file) == 6 and poor.report()["cost"] == pytest.approx(6 * 160e-6)
        rich = ranker(**prices)
        assert [each.tolist() for each in rich.scores(questions, candidates)] == [[0.0, 1.0]] * 10
        report = rich.report()
        assert report["cache_hits"] == 6 and report["requests"] == 14 and server.paid_twice == 0
        rich.scores(questions, candidates)
        assert rich.report()["requests"] == 0 and rich.report()["cost"] == 0  # of the last scores


class TestPointwise:
    def test_the_score_is_the_rating(self, server, ranker):
        server.behave = lambda body, _: f"Rating: [[{len(shown(body)[0])}]]"
        one = ranker(form="pointwise")
        first, second = one.scores([question(), question(id="b")], [["a", "bbb"], ["cc", "cc"]])
        assert first.tolist() == [1.0, 3.0] and second.tolist() == [2.0, 2.0]
        assert one.report()["ratings"] == 3 and server.bodies[0]["temperature"] == 0

    def test_malformed_drops_the_prompt(self, server, ranker):
        server.behave = lambda body, _: {"a": "[[8]]", "b": "nice", "c": "[[6]]"}[shown(body)[0]]
        one = ranker(form="pointwise")
        (scores,) = one.scores([question()], [["a", "b", "c"]])
        np.testing.assert_equal(scores, [8.0, np.nan, 6.0])
        assert one.report()["malformed"] == one.report()["dropped"] == 1


class TestLogprob:
    def test_the_two_orders_are_averaged(self, server, ranker):
        def behave(body, _):
            second = {"ab": 0.9, "ba": 0.3}["".join(shown(body))]
            return completion("M", logprobs={"m": np.log(1 - second), "M": np.log(second)})

        server.behave = behave
        one = ranker(form="logprob")
        (scores,) = one.scores([question()], [["a", "b"]])
        # a wins 0.1 as the first and 0.3 as the second
        np.testing.assert_allclose(scores, [0.2, 0.8])
        body = server.bodies[0]
        assert (body["max_tokens"], body["temperature"], body["top_logprobs"]) == (1, 0.0, 5)
        assert body["logprobs"] is True and one.report()["disagreements"] == 0

    def test_neither_token_and_no_logprobs_are_malformed(self, server, ranker):
        server.behave = lambda body, _: completion("The", logprobs={"The": -0.1})
        one = ranker(form="logprob")
        assert np.isnan(one.scores([question()], [["a", "b"]])[0]).all()
        assert one.report()["malformed"] == 2
        server.behave = lambda body, _: "m"
        assert np.isnan(one.scores([question()], [["c", "d"]])[0]).all()
        assert one.report()["malformed"] == 2 and "form: pairwise" in one.unread[0]


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"form": "pairwize"}, "unknown form 'pairwize'; did you mean 'pairwise'"),
        ({"on_malformed": "guess"}, "on_malformed is 'guess'"),
        ({"form": "pointwise", "on_malformed": "tie"}, "not tie: a rating is not a comparison"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_cost": 1.0}, "needs prices"),
        ({"modle": 1}, "unknown setting 'modle'; did you mean 'model'"),
    ],
)
def test_settings_of_the_ranker(ranker, settings, what):
    with pytest.raises(FeedbackError, match=what):
        ranker(**settings)


def test_the_cache_has_a_place_of_its_own(server, monkeypatch, tmp_path):
    monkeypatch.setenv("SELM_CACHE", str(tmp_path / "home"))
    server.behave = lambda body, _: "[[5]]"
    one = judge("m", form="pointwise", base_url=server.url)
    one.scores([question()], [["a"]])
    assert (tmp_path / "home" / "judge.sqlite").exists() and os.listdir(tmp_path) == ["home"]
