"""A judge behind a real HTTP server whose answers are scripted."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Self


class Judge:
    """Answers with `says(body)`: a text, a mapping of log-probabilities of the first token, or the
    whole reply. What `refuses(body)` gives words for is refused in them, with status 400."""

    def __init__(self):
        self.says = lambda body: "Rating: [[5]]"
        self.refuses = lambda body: None
        self.bodies = []
        lock = threading.Lock()
        judge = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = (
                1 << 16
            )  # head and body in one packet: the client need not wait for the second

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    judge.bodies.append(body)
                    no, said = judge.refuses(body), judge.says(body)
                whole = isinstance(said, dict) and "choices" in said
                raw = json.dumps(
                    {"error": {"message": no}} if no else said if whole else reply(said)
                )
                self.send_response(400 if no else 200)
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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.http.shutdown()
        self.http.server_close()


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
