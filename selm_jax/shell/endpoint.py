"""An HTTP client for JSON servers that retries temporary faults. It never prints an API key.

async with Endpoint("http://127.0.0.1:8000/v1/completions") as endpoint:
    answer = await endpoint.ask({"prompt": "Hello"}, read=json.loads)
"""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import logging
import math
import os
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import httpx2

from selm_jax.shell.pace import here

_LONGEST_WAIT = 60.0  # seconds between two tries, unless the server asks for more
_LONGEST_RETRY_AFTER = 600.0  # seconds; a server that asks for more is given up
_MOST_BYTES = 16 << 20  # of one answer: a server may stream without end
_SECRET = 8  # a key shorter than this ("EMPTY") is a placeholder and may be shown

T = TypeVar("T")


class ServerError(Exception):
    """A server cannot be reached, or its answers cannot be used."""


class _Fault(Exception):
    """One request failed. If `final`, sending the request again would not help."""

    def __init__(self, what: str, *, wait: float = 0.0, final: bool = False):
        super().__init__(what)
        self.wait = wait
        self.final = final


@dataclass
class Tries:
    """Counts of the requests, retries and failures of an `Endpoint`.

    Attributes:
        requests: requests sent to the server, including retries.
        retries: requests sent again after a fault.
        failures: requests that were given up without an answer.
    """

    requests: int = 0
    retries: int = 0
    failures: int = 0


class Endpoint:
    """A client of a server's URL that accepts JSON by POST.

    Temporary faults (connection, timeout, 408, 409, 429, 5xx, an answer that cannot be read) are
    retried after a wait that doubles each time, with jitter, and that is never shorter than the
    server's Retry-After.

    The API key is read from the environment for each request and is not stored. If the server
    sends it back, it is removed from what is returned and shown.

    Args:
        url: the server's URL.
        key_env: name of the environment variable that contains the API key; None sends no key.
        concurrency: maximum number of connections at once.
        timeout: seconds for one whole answer.
        retries: maximum number of retries of one request.
        backoff: seconds before the first retry.
        on_fault: called with a description of each fault, before the wait for the next try. If it
            raises, the request ends.

    Attributes:
        tries: counts of requests, retries and failures.
    """

    def __init__(
        self,
        url: str,
        *,
        key_env: str | None = None,
        concurrency: int = 16,
        timeout: float = 120.0,
        retries: int = 6,
        backoff: float = 1.0,
        on_fault: Callable[[str], None] = lambda fault: None,
    ):
        self.url = url
        self.on_fault = on_fault
        self.key_env = key_env
        self.concurrency = concurrency
        self.timeout = timeout
        self.retries = retries
        self.backoff = backoff
        self.tries = Tries()
        for logger in ("httpx2", "httpcore2"):
            # They log every request, and at DEBUG the server's headers, which may echo the key.
            logging.getLogger(logger).setLevel(logging.WARNING)

    async def __aenter__(self) -> Endpoint:  # noqa: PYI034  (beartype takes no Self on a method)
        self._closing = asyncio.Event()
        limits = httpx2.Limits(max_connections=self.concurrency)
        # `_post` limits the time of the whole answer; httpx2's timeouts limit single steps.
        self._http = httpx2.AsyncClient(
            timeout=None, limits=limits, trust_env=not is_here(self.url)
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    def close_soon(self) -> None:
        """Stops further retries. Requests already under way are not interrupted."""
        self._closing.set()

    @property
    def closing(self) -> bool:
        return self._closing.is_set()

    async def ask(self, body: Mapping[str, Any], read: Callable[[str], T], about: str = "") -> T:
        """Sends a request and returns the answer as `read` parses it.

        Args:
            body: the JSON object to send.
            read: parses the answer's text. It raises ValueError for an answer that is incomplete or
                malformed, and ServerError for one that a retry would not fix.
            about: text to put after the URL in errors.

        Raises:
            ServerError: no try returned an answer that `read` accepts.
        """
        first = ""
        for attempt in range(self.retries + 1):
            self.tries.requests += 1
            self.tries.retries += attempt > 0
            try:
                return await self._post(body, read)
            except _Fault as fault:
                what = f"{self.url}{about}: {fault}"
                first = first or str(fault)
                self.on_fault(str(fault))
                if fault.final or attempt == self.retries:
                    break
                wait = min(self.backoff * 2.0 ** min(attempt, 60), _LONGEST_WAIT) * random.uniform(
                    0.5, 1
                )
                # More jitter: otherwise all clients that were told to wait return at once.
                wait = max(wait, fault.wait * random.uniform(1, 1.1))
                if not await self._still_open_after(wait):
                    break
        self.tries.failures += 1
        began = "" if first in what else f"; the first fault was {first}"
        raise ServerError(f"{what} (try {attempt + 1} of at most {self.retries + 1}{began})")

    async def _still_open_after(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._closing.wait(), seconds)
        except TimeoutError:
            return True
        return False

    async def _post(self, body: Mapping[str, Any], read: Callable[[str], T]) -> T:
        key = api_key(self.key_env)
        headers = authorization(key)
        raw = bytearray()
        try:
            async with (
                asyncio.timeout(self.timeout),
                self._http.stream("POST", self.url, json=body, headers=headers) as response,
            ):
                async for some in response.aiter_bytes():
                    raw += some
                    if len(raw) > _MOST_BYTES:
                        raise _Fault(f"the answer is longer than {_MOST_BYTES} bytes")
        except TimeoutError:
            raise _Fault(f"no complete answer within {self.timeout:g} s") from None
        except httpx2.RequestError as error:
            # `from None`: the error contains the request, which contains the key.
            what = f"{type(error).__name__}: {error}"
            raise _Fault(_without(key, what)) from None
        here.sign()
        text = _without(key, raw.decode("utf-8", "replace"))
        if response.status_code != 200:
            raise _status_fault(response.status_code, response.headers.get("retry-after"), text)
        try:
            return read(text)
        except ServerError as error:
            raise _Fault(f"the answer is {error}: {text[:300]!r}", final=True) from None
        except ValueError as error:
            raise _Fault(f"the answer is {error}: {text[:300]!r}") from None


def api_key(key_env: str | None) -> str:
    """The API key in an environment variable; an empty string if `key_env` is None.

    Raises:
        ServerError: the variable is not set, is empty, or cannot be sent as a key.
    """
    if key_env is None:
        return ""
    key = os.environ.get(key_env, "").strip()
    if not (key and key.isascii() and key.isprintable()):
        raise ServerError(
            f"key_env is {key_env!r}, but that environment variable "
            f"{'has characters that no API key has' if key else 'is not set or empty'}. Put the "
            "server's key there."
        )
    return key


def authorization(key: str) -> dict[str, str]:
    """The HTTP header with an API key; no header for an empty key."""
    return {"Authorization": f"Bearer {key}"} if key else {}


async def for_each(todo: Iterable[T], do: Callable[[T], Awaitable[None]], at_once: int) -> None:
    """Awaits `do` for each item, at most `at_once` at a time.

    The next item is taken from the iterable only when one of these has finished.

    Raises:
        Exception: the first error of any item; no further item is started after it.
    """
    left = iter(todo)  # shared by the workers

    async def work() -> None:
        for each in left:
            await do(each)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(at_once):
                group.create_task(work())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None


def is_here(url: str) -> bool:
    """Says whether a URL points to this machine; such requests bypass the environment's proxy."""
    return httpx2.URL(url).host in ("localhost", "127.0.0.1", "::1")


def checked_url(url: str, name: str) -> httpx2.URL:
    """Parses a server's URL and checks that it contains no key.

    Args:
        url: the URL to check.
        name: the setting's name, for errors.

    Raises:
        ServerError: it is not an HTTP URL, or it contains what may be a secret.
    """
    try:
        found = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ServerError(
            f"{name} {url!r} is not a URL: {error}. Expected http(s)://host[:port][/path]."
        ) from None
    if found.userinfo or found.query:
        # Not shown: it may well be a secret.
        raise ServerError(
            f"{name} contains a user name, a password or a query (`?...`); expected "
            "http(s)://host[:port][/path]. Put a key into the environment: see key_env."
        )
    if found.scheme not in ("http", "https") or not found.host:
        raise ServerError(f"{name} is {url!r}; expected http(s)://host[:port][/path].")
    return found


def _without(key: str, text: str) -> str:
    return text.replace(key, "[key]") if len(key) >= _SECRET else text


def _status_fault(status: int, retry_after: str | None, text: str) -> _Fault:
    what = f"HTTP status {status}: {text[:300]!r}"
    if status == 429 and "insufficient_quota" in text:  # OpenAI's word for an empty account
        return _Fault(what, final=True)
    if status not in (408, 409, 429) and status < 500:
        return _Fault(what, final=True)
    wait = _seconds(retry_after)
    if wait > _LONGEST_RETRY_AFTER:
        return _Fault(f"{what}; it asks to wait {wait:.0f} s before a retry", final=True)
    return _Fault(what, wait=wait)


def _seconds(retry_after: str | None) -> float:
    """The seconds that a Retry-After header (number or date, RFC 9110) asks to wait; 0 without."""
    if retry_after is None:
        return 0.0
    try:
        wait = float(retry_after)
    except ValueError:
        try:
            until = email.utils.parsedate_to_datetime(retry_after)
        except ValueError:
            return 0.0
        if until.tzinfo is None:
            until = until.replace(tzinfo=datetime.UTC)
        wait = (until - datetime.datetime.now(datetime.UTC)).total_seconds()
    return max(wait, 0.0) if math.isfinite(wait) else 0.0
