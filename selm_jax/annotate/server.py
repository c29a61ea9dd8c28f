"""Serves the web page on which people rank answers, and handles the page's requests.

All addresses begin with `/TOKEN/`; any other address gets status 403. The page loads nothing from
other servers. The reply to a ranking is sent after the ranking is on disk.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import uvicorn
from markupsafe import Markup
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from selm_jax.annotate.checks import LONGEST_COMMENT, AnnotationError, check_name
from selm_jax.annotate.patience import Patient
from selm_jax.annotate.render import markdown, plain, visible
from selm_jax.annotate.store import Annotations, Item
from selm_jax.shell import jsonl

TOKEN = "SELM_ANNOTATE_TOKEN"  # environment variable with a token to keep over restarts
LARGEST_BODY = 64 * 1024  # bytes
# Seconds for which a question on one person's page is only shown to others if no other is open.
HELD = 600.0

_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}
_HERE = Path(__file__).parent


@dataclass
class Desk:
    """Tracks which question each annotator's page shows, and chooses the next question."""

    store: Annotations
    batch: str
    held: dict[str, tuple[str, float]] = field(default_factory=dict)  # person -> question, since

    def next(self, annotator: str) -> Item | None:
        """The annotator's present question if still open, or else the least shown open question."""
        choice = self.store.open_questions(self.batch, annotator)
        if not choice:
            self.held.pop(annotator, None)
            return None
        mine = self.held.get(annotator, ("", 0.0))[0]
        if mine not in choice:
            now = time.monotonic()
            others = [q for q, since in self.held.values() if now - since < HELD]
            mine = min(choice, key=others.count)  # the first of equals
        self.hold(annotator, mine)
        return self.store.item(mine)

    def hold(self, annotator: str, question: str) -> None:
        self.held[annotator] = question, time.monotonic()


def shown_order(annotator: str, question: str, count: int) -> list[int]:
    """The order in which a person sees the answers: random, but always the same."""
    keys = [hashlib.sha256(f"{annotator}\n{question}\n{i}".encode()).digest() for i in range(count)]
    return sorted(range(count), key=keys.__getitem__)


def make_app(
    store: Annotations, batch: str, title: str, token: str, instructions: str = ""
) -> ASGIApp:
    """Makes the ASGI application that serves one batch of questions to annotators.

    Args:
        instructions: text in Markdown that is shown above every question.
    """
    desk = Desk(store, batch)
    files = {
        "page.js": ("text/javascript", (_HERE / "page.js").read_text(encoding="utf-8")),
        "page.css": ("text/css", (_HERE / "page.css").read_text(encoding="utf-8")),
    }
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("page.html.jinja").render(
        title=visible(title),
        instructions=Markup(markdown(instructions)) if instructions.strip() else "",
        longest_comment=LONGEST_COMMENT,
    )

    async def get_page(request: Request) -> Response:  # noqa: ARG001 (starlette passes it)
        return Response(page, media_type="text/html")

    async def get_file(request: Request) -> Response:
        kind, text = files[request.url.path.rpartition("/")[2]]
        return Response(text, media_type=kind)

    def post(work: Callable[[Desk, dict[str, Any]], Any]):
        async def endpoint(request: Request) -> Response:
            try:
                return JSONResponse(await run_in_threadpool(work, desk, await _body(request)))
            except AnnotationError as error:
                return JSONResponse({"error": str(error)}, status_code=400)

        return endpoint

    routes = [
        Route(f"/{token}/", get_page),
        *(Route(f"/{token}/{name}", get_file) for name in files),
        Route(f"/{token}/next", post(_next), methods=["POST"]),
        Route(f"/{token}/judge", post(_judge), methods=["POST"]),
        Route(f"/{token}/undo", post(_undo), methods=["POST"]),
    ]
    return _Guard(Starlette(routes=routes), token)


def serve(
    store: Annotations,
    batch: str,
    title: str,
    host: str,
    port: int,
    say: Callable[[str], object] = print,
    instructions: str = "",
) -> None:
    """Serves a batch of questions to annotators until Ctrl-C.

    Args:
        instructions: see `make_app`.
        port: the port; 0 takes a free one.
        say: called with the address, which includes the token, once the port is open.

    Raises:
        AnnotationError: the port is not available, or the token is not valid.
    """
    token = os.environ.get(TOKEN) or secrets.token_urlsafe(24)
    if not token.replace("-", "").replace("_", "").isalnum() or len(token) < 16:
        raise AnnotationError(
            f"the token in {TOKEN} is not valid; expected at least 16 letters, digits, - or _."
        )
    config = uvicorn.Config(
        make_app(store, batch, title, token, instructions),
        host=host, port=port, log_level="error", access_log=False, timeout_graceful_shutdown=2,
        http=Patient,
    )  # fmt: skip  # no access log: it would contain the token
    try:
        socket = config.bind_socket()
    except SystemExit as error:  # uvicorn's answer to a port in use
        raise AnnotationError(
            f"cannot listen on {host}:{port}; another program may use it. Choose another --port."
        ) from error
    socket.listen()  # from now on, connections wait and are not refused
    say(f"http://{host}:{socket.getsockname()[1]}/{token}/")
    uvicorn.Server(config).run(sockets=[socket])


@dataclass
class _Guard:
    """ASGI middleware that requires the secret token in every URL and adds security headers."""

    app: ASGIApp
    token: str

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message["headers"],
                    *((key.encode(), value.encode()) for key, value in _HEADERS.items()),
                ]
            await send(message)

        given = (
            scope["path"].partition("/")[2].partition("/")[0]
        )  # OPTIONS and CONNECT may lack both
        if secrets.compare_digest(given.encode(), self.token.encode()):
            await self.app(scope, receive, with_headers)
        else:
            text = "403: this address lacks the token. Open the one that `selm annotate` printed.\n"
            await PlainTextResponse(text, 403)(scope, receive, with_headers)


async def _body(request: Request) -> dict[str, Any]:
    """Parses the body of a request as a JSON object. Raises AnnotationError if there is none."""
    content = b""
    async for chunk in request.stream():
        content += chunk
        if len(content) > LARGEST_BODY:
            raise AnnotationError(f"the request has more than {LARGEST_BODY} bytes.")
    try:
        body = jsonl.value(content.decode("utf-8"))
    except ValueError as error:
        raise AnnotationError(f"the request is not JSON: {error}.") from error
    if not isinstance(body, dict):
        raise AnnotationError(f"the request is not a JSON object: {body!r}.")
    return body


def _next(desk: Desk, body: Mapping[str, Any]) -> dict[str, Any]:
    annotator = check_name(body.get("annotator"))
    return _view(desk, annotator, desk.next(annotator))


def _judge(desk: Desk, body: Mapping[str, Any]) -> dict[str, Any]:
    annotator = check_name(body.get("annotator"))
    seconds, question = body.get("seconds"), _text(body, "question")
    if not isinstance(seconds, int | float) or not 0 <= seconds < 1e6:
        raise AnnotationError(f"seconds is {seconds!r}; expected a number from 0 to 1,000,000.")
    ranks = body.get("ranks")
    if ranks is not None and not isinstance(ranks, list):
        raise AnnotationError(f"ranks is {ranks!r}; expected a list, or null for a skip.")
    order = shown_order(annotator, question, len(desk.store.item(question).answers))
    desk.store.judge(
        question, annotator, ranks,
        request=_text(body, "request"), shown=order, seconds=float(seconds),
        comment=body.get("comment"),
    )  # fmt: skip
    return _view(desk, annotator, desk.next(annotator))


def _undo(desk: Desk, body: Mapping[str, Any]) -> dict[str, Any]:
    annotator = check_name(body.get("annotator"))
    undone = desk.store.undo(desk.batch, annotator, request=_text(body, "request"))
    if undone is None:
        return _view(desk, annotator, desk.next(annotator))
    item, before = undone
    desk.hold(annotator, item.digest)
    return _view(desk, annotator, item) | {"ranks": before.ranks, "comment": before.comment}


def _text(body: Mapping[str, Any], key: str) -> str:
    value = body.get(key)
    if not isinstance(value, str) or not 0 < len(value) <= 128 or not value.isprintable():
        raise AnnotationError(f"{key} is {value!r}; expected 1 to 128 printable characters.")
    return value


def _view(desk: Desk, annotator: str, item: Item | None) -> dict[str, Any]:
    """The JSON that the page shows: the annotator's next question, if any, and the progress."""
    progress = desk.store.progress(desk.batch, annotator)
    view: dict[str, Any] = {"progress": vars(progress), "question": None}
    if item is not None:
        order = shown_order(annotator, item.digest, len(item.answers))
        view["question"] = {
            "digest": item.digest,
            "prompt_id": visible(item.prompt_id),
            "messages": [{"role": r, **_both(text)} for r, text in item.messages],
            "answers": [{"index": i, **_both(item.answers[i])} for i in order],
        }
    return view


def _both(text: str) -> dict[str, str]:
    return {"html": markdown(text), "plain": plain(text)}
