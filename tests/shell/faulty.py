"""A proxy before an object store that answers with errors, late, half, or not at all, on demand."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit


@dataclass
class Request:
    """A request as it came, or as it is sent on."""

    method: str
    path: str
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""

    @property
    def is_list(self) -> bool:
        return self.method == "GET" and "list-type=2" in self.path


@dataclass
class Answer:
    status: int
    headers: dict[str, str]
    body: bytes = b""


Server = Callable[[Request], Answer]


@dataclass
class Fault:
    """What goes wrong with `times` requests that match, after `skip` that match and go well.

    Attributes:
      method, part: which requests match: by method, and by a part of the path.
      status: the proxy gives this answer, and the server never sees the request.
      refused: the connection is closed before the server has seen the request.
      lost: the server does what is asked, and the connection is closed before its answer.
      cut: the connection is closed in the middle of the answer.
      stale: an answer to this request from before this fault began is given, if there was one.
      wait: the request is held back until this is set, for ten seconds at most.
    """

    method: str = ""
    part: str = ""
    times: int = 1
    status: int = 0
    refused: bool = False
    lost: bool = False
    cut: bool = False
    stale: bool = False
    wait: threading.Event | None = None
    skip: int = 0

    def meets(self, request: Request) -> bool:
        """Whether this request goes wrong; counts it if so."""
        if not request.method.startswith(self.method) or self.part not in request.path:
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        self.times -= 1
        return self.times >= 0


class Proxy:
    """The faults to come, and what was asked so far.

    Attributes:
      url: where it listens.
      asked: the requests, in order of their coming: method and path.
    """

    def __init__(self, server: Server):
        self.server, self.url = server, ""
        self.faults: list[Fault] = []
        self.asked: list[tuple[str, str]] = []
        self._lists: dict[str, Answer] = {}
        self._lock = threading.Lock()

    def fault_of(self, request: Request) -> Fault | None:
        with self._lock:
            self.asked.append((request.method, request.path))
            return next((fault for fault in self.faults if fault.meets(request)), None)

    def answer(self, request: Request, stale: bool) -> Answer:
        if stale and request.path in self._lists:
            return self._lists[request.path]
        answer = self.server(request)
        if request.is_list:
            self._lists[request.path] = answer
        return answer


@contextlib.contextmanager
def proxy(server: Server) -> Iterator[Proxy]:
    """A proxy that listens on a free port of this machine, in threads of this process."""
    shared = Proxy(server)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: Any) -> None:
            pass

        def handle_one_request(self) -> None:
            with contextlib.suppress(ConnectionError):
                super().handle_one_request()

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length)
            request = Request(self.command, self.path, dict(self.headers.items()), body)
            fault = shared.fault_of(request) or Fault()
            if fault.wait:
                fault.wait.wait(10)
            if fault.refused:
                self.close_connection = True
                return
            if fault.status:
                self.send(Answer(fault.status, {}, b"the proxy says so"))
                return
            answer = shared.answer(request, fault.stale)
            if fault.lost:
                self.close_connection = True
                return
            self.send(answer, cut=fault.cut)

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = answer

        def send(self, answer: Answer, *, cut: bool = False) -> None:
            self.send_response(answer.status)
            given = {name.title(): value for name, value in answer.headers.items()}
            for name in ("Transfer-Encoding", "Connection", "Date", "Server"):
                given.pop(name, None)
            if self.command != "HEAD" or "Content-Length" not in given:
                given["Content-Length"] = str(len(answer.body))
            for name, value in given.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                half = len(answer.body) // 2
                self.wfile.write(answer.body[:half] if cut else answer.body)
                self.close_connection = self.close_connection or cut

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        listening.daemon_threads = True
        shared.url = f"http://127.0.0.1:{listening.server_address[1]}"
        serving = threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True)
        serving.start()
        try:
            yield shared
        finally:
            listening.shutdown()
            serving.join()


def upstream(url: str) -> Server:
    """Sends requests on to a server at this address, as if they had been meant for it."""
    where = urlsplit(url).netloc

    def send(request: Request) -> Answer:
        connection = http.client.HTTPConnection(where, timeout=60)
        try:
            ours = {"Host": where, "Connection": "close"}
            theirs = {k: v for k, v in request.headers.items() if k.title() not in ours}
            headers = {**theirs, **ours}
            connection.request(request.method, request.path, request.body, headers)
            got = connection.getresponse()
            return Answer(got.status, dict(got.getheaders()), got.read())
        finally:
            connection.close()

    return send
