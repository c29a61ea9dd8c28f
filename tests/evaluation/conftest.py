"""A tiny chat model, and evaluation on one device; what a mesh changes is tested by itself. A judge
that says what a script tells it, over real HTTP."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax
import pytest
from rich.console import Console
from tiny import make_model

from selm_jax.evaluation.model import Model, open_model
from selm_jax.parallel.mesh import make_mesh


@pytest.fixture(autouse=True, scope="session")
def one_device():
    first = jax.devices()[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("selm_jax.evaluation.model.make_mesh", lambda sizes: make_mesh(sizes, first))
        yield


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two tiny random chat models of one shape."""
    root = tmp_path_factory.mktemp("models")
    return [make_model(root / name, seed) for name, seed in (("one", 0), ("two", 1))]


@pytest.fixture(scope="session")
def model(folders) -> Model:
    return open_model(str(folders[0]), slots=8, console=Console(quiet=True))


class Judge:
    """Answers with `says(body)`: a text, or a mapping of log-probabilities of the first token."""

    def __init__(self):
        self.says = lambda body: "Rating: [[5]]"
        self.bodies = []
        lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    judge.bodies.append(body)
                    said = judge.says(body)
                raw = json.dumps(
                    said if isinstance(said, dict) and "choices" in said else reply(said)
                )
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(raw.encode())))
                self.end_headers()
                self.wfile.write(raw.encode())

            def log_message(self, *_):
                pass

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 64

        self.http = Quiet(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()


def reply(said: str | dict[str, float]) -> dict:
    text = said if isinstance(said, str) else max(said, key=said.get)
    choice = {
        "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text},
        "logprobs": None,
    }  # fmt: skip
    if not isinstance(said, str):
        top = [{"token": t, "bytes": None, "logprob": x} for t, x in said.items()]
        content = [{"token": text, "bytes": None, "logprob": said[text], "top_logprobs": top}]
        choice["logprobs"] = {"content": content}
    usage = {"prompt_tokens": 100, "completion_tokens": 1, "total_tokens": 101}
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "judge",
        "choices": [choice], "usage": usage,
    }  # fmt: skip


@pytest.fixture
def judge():
    judge = Judge()
    yield judge
    judge.http.shutdown()
    judge.http.server_close()
