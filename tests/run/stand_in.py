"""A stand-in without a model for the parts of vLLM and SGLang servers that `rollout.remote` uses.

python stand_in.py vllm FOLDER PORT [--dies ANSWERS LAST_WORDS]

With --dies it dies after that many answers, as vLLM does: first a request fails with status 500,
then its process prints its last words and ends.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


def vllm(ids, finish="stop", end=None, logps=None) -> dict[str, Any]:
    choice = {"index": 0, "text": "", "finish_reason": finish, "stop_reason": end}
    choice["logprobs"] = None if logps is None else {"token_logprobs": logps}
    return {"object": "text_completion", "choices": [choice | {"token_ids": ids}]}


def sglang(ids, finish="stop", end=None, logps=None) -> dict[str, Any]:
    about: dict[str, Any] = {"finish_reason": {"type": finish, "matched": end}}
    if logps is not None:
        about["output_token_logprobs"] = [[logp, 0, None] for logp in logps]
    return {"output_ids": ids, "meta_info": about}


def prompt_of(body) -> list[int]:
    return body["prompt"] if "prompt" in body else body["input_ids"]


def some_letters(body) -> list[int]:
    """Ids that depend on the prompt and on the seed, if one is sent, and the end."""
    end = (body if "prompt" in body else body["sampling_params"])["stop_token_ids"][-1]
    text = json.dumps([prompt_of(body), body.get("seed"), body.get("temperature")])
    number = zlib.crc32(text.encode())
    return [100 + number % 7 + i for i in range(1 + number % 5)] + [end]


def mortal(answers: int, last_words: str) -> Callable:
    """Answers so many requests; the next one fails, and the one after that is the last."""
    left = iter(range(answers + 2))

    def answer(body):
        number = next(left)
        if number < answers:
            return some_letters(body)
        if number == answers:
            return 500, {
                "error": "EngineCore encountered an issue. See stack trace for the root cause."
            }
        print(last_words.replace("|", "\n"), flush=True)
        os._exit(7)

    return answer


class StandIn(ThreadingHTTPServer):
    """Serves `folder` on a port of its own and keeps the requests in `bodies`.

    If `folder` is None, the server is not up yet. `answer` turns the body of a request into token
    ids, or into a status and a text.
    """

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, engine: str, folder, port: int = 0, answer: Callable = some_letters):
        self.engine, self.folder, self.answer = engine, folder, answer
        self.longest = None  # what it tells of its context
        self.bodies: list[dict[str, Any]] = []
        super().__init__(("127.0.0.1", port), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: StandIn

    def do_GET(self):
        paths = {"vllm": "/v1/models", "sglang": "/get_model_info"}
        if self.path in ("/version", "/get_server_info"):
            self.reply(200, {"version": "0.0.1"})
        elif self.path != paths[self.server.engine]:
            self.reply(404, {"error": "no such path"})
        elif self.server.folder is None:
            self.reply(503, {"error": "loading"})
        elif self.server.engine == "vllm":
            about = {"id": "policy", "root": str(self.server.folder)}
            self.reply(200, {"data": [about | {"max_model_len": self.server.longest}]})
        else:
            self.reply(200, {"model_path": str(self.server.folder)})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body | {"path": self.path})
        answer = self.server.answer(body)
        if isinstance(answer, tuple):
            self.reply(*answer)
        else:
            self.reply(200, {"vllm": vllm, "sglang": sglang}[self.server.engine](answer))

    def reply(self, status: int, tree: Any) -> None:
        raw = json.dumps(tree).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_):
        pass


if __name__ == "__main__":
    print(f"serving {sys.argv[2]} as process {os.getpid()}", flush=True)
    server = StandIn(sys.argv[1], sys.argv[2], int(sys.argv[3]))
    if "--dies" in sys.argv:
        server.answer = mortal(int(sys.argv[-2]), sys.argv[-1])
    server.serve_forever(0.05)
