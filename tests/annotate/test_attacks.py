"""The annotation server against requests that no page sends."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
import threading

import pytest
import uvicorn
from hypothesis import given, settings
from hypothesis import strategies as st

from selm_jax.annotate import patience, server
from selm_jax.annotate.store import Annotations
from selm_jax.feedback.judge.cache import AnswerCache

BATCH = "run/iteration_1"
TOKEN = "a-token-for-the-tests-0123456789"
VERBS = ("next", "judge", "undo")


@pytest.fixture(scope="module")
def app(tmp_path_factory, item):
    store = Annotations(tmp_path_factory.mktemp("attacked") / "annotations.sqlite")
    store.put(BATCH, [item(0)])
    return server.make_app(store, BATCH, "title", TOKEN)


def status(app, path, body=b"", method="POST"):
    """The status of the reply. An exception that uvicorn would make a 500 of is one here."""
    sent, parts = [], iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive():
        return next(parts)

    async def send(message):
        sent.append(message)

    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method,
        "scheme": "http", "path": path, "raw_path": path.encode(), "query_string": b"",
        "root_path": "", "headers": [], "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 2),
    }  # fmt: skip
    asyncio.run(app(scope, receive, send))
    return sent[0]["status"]


@pytest.mark.parametrize("method", ["GET", "POST", "OPTIONS", "CONNECT", "PUT", "HEAD"])
@pytest.mark.parametrize("path", ["*", "", "/", "a.host:443", "//", f"/{TOKEN}x/next", TOKEN])
def test_without_the_token_everything_is_refused(app, method, path):
    assert status(app, path, method=method) == 403


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("open_, close", ["[]", ('{"a":', "}")])
def test_what_is_nested_deeply_is_refused(app, verb, open_, close):
    body = (open_ * 12_000)[:50_000] + "1" + close * 12_000
    assert status(app, f"/{TOKEN}/{verb}", body.encode()[: server.LARGEST_BODY]) == 400


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["\ud800", "Ada", "x" * 200, 10**400, "\0"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=5,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(verb=st.sampled_from(VERBS), change=st.dictionaries(
    st.sampled_from(["annotator", "question", "ranks", "seconds", "request"]), values, max_size=3
))  # fmt: skip
def test_no_request_makes_the_server_stumble(app, item, verb, change):
    good = {"annotator": "Ada", "question": item(0).digest, "ranks": [1, 1, 1], "seconds": 1.0}
    body = json.dumps(good | {"request": "r"} | change).encode()
    assert status(app, f"/{TOKEN}/{verb}", body) in (200, 400)


@pytest.mark.parametrize(
    "body", [b'{"annotator": ' + b"9" * 5000 + b"}", b"\xff", b"[1, 2", b"NaN"]
)
def test_what_is_no_request(app, body):
    assert status(app, f"/{TOKEN}/next", body) == 400


@pytest.fixture
def port(tmp_path, item, monkeypatch):
    """A server at work, for as long as a request may take: 0.2 seconds."""
    monkeypatch.setattr(patience, "SECONDS", 0.2)
    monkeypatch.setenv("SELM_ANNOTATE_TOKEN", TOKEN)
    running, told, ready = [], [], threading.Event()
    run = uvicorn.Server.run

    def remembered(self, **arguments):
        running.append(self)
        run(self, **arguments)

    def say(address):
        told.append(int(address.split(":")[2].split("/")[0]))
        ready.set()

    monkeypatch.setattr(uvicorn.Server, "run", remembered)
    store = Annotations(tmp_path / "annotations.sqlite")
    store.put(BATCH, [item(0)])
    thread = threading.Thread(
        target=server.serve, args=(store, BATCH, "title", "127.0.0.1", 0, say), daemon=True
    )
    thread.start()
    assert ready.wait(30)
    yield told[0]
    running[0].should_exit = True
    thread.join(30)


WHOLE = f"GET /{TOKEN}/ HTTP/1.1\r\nHost: h\r\n\r\n".encode()
HALVES = {
    "nothing": b"",
    "half a line": b"GET /",
    "half a header": WHOLE[:-2],
    "half a body": (
        f"POST /{TOKEN}/next HTTP/1.1\r\nHost: h\r\nContent-Length: 9\r\n\r\n{{".encode()
    ),
}


@pytest.mark.parametrize(
    ("before", "name"),
    [(b"", name) for name in HALVES] + [(WHOLE, name) for name in HALVES if name != "nothing"],
)
def test_who_sends_half_a_request_is_hung_up_on(port, name, before):
    with socket.create_connection(("127.0.0.1", port), timeout=20) as line:
        line.sendall(before)
        if before:
            assert b"200 OK" in line.recv(1 << 20)
        line.sendall(HALVES[name])
        while line.recv(1 << 20):  # ends when the server has hung up, or fails after 20 s
            pass


def test_databases_are_their_owners_alone(tmp_path, item):
    store = Annotations(tmp_path / "annotations.sqlite")
    store.put(BATCH, [item(0)])
    with store._open() as database, AnswerCache(tmp_path / "judge.sqlite") as cache:
        database.execute("begin immediate")
        cache.put("k", {"model": "m"}, {"text": "t"})
        files = list(tmp_path.iterdir())
        assert len(files) > 2  # write-ahead logs too
        for file in files:
            assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
