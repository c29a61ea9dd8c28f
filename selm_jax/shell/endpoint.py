"""Asking a server over HTTP, and asking again where that can help. API keys reach no text.

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

_LONGEST_WAIT = 60.0  # seconds between two tries, unless the server asks for more
_LONGEST_RETRY_AFTER = 600.0  # seconds; who asks for more has closed for the day
_MOST_BYTES = 16 << 20  # of one answer: a server may stream without end
_SECRET = 8  # a key shorter than this ("EMPTY") is a placeholder and may stand in a text

T = TypeVar("T")


class ServerError(Exception):
    """A server cannot be asked, or what it answers cannot be used."""


class _Fault(Exception):
    """What went wrong with one request. `final`: trying again would not help."""

    def __init__(self, what: str, *, wait: float = 0.0, final: bool = False):
        super().__init__(what)
        self.wait = wait
        self.final = final


@dataclass
class Tries:
    """What became of the requests.

    Attributes:
        requests: sent to the server, retries included.
        retries: requests sent again after a fault.
        failures: answers given up.
    """

    requests: int = 0
    retries: int = 0
    failures: int = 0


class Endpoint:
    """One address that takes JSON by POST.

    Faults of the way (connection, time, 408, 409, 429, 5xx, an answer that cannot be read) are tried
    again, after a wait that doubles, with jitter, and no shorter than the server's Retry-After.

    The API key is read from the environment for each request and kept nowhere. Should the server
    send it back, it is cut out of what is returned and shown.

    Args:
        url: the address.
        key_env: name of the environment variable that holds the API key; None sends no key.
        concurrency: most connections at once.
        timeout: seconds for one whole answer.
        retries: most times one request is sent again.
        backoff: seconds before the first retry.
        on_fault: told each fault in words, before it is waited for another try. What it raises ends
            the request.

    Attributes:
        tries: what became of the requests since it was opened.
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
        # One limit of time stands over the whole answer (`_post`); httpx2's are for its parts.
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
        """From now on nobody waits for another try. Requests under way are not disturbed."""
        self._closing.set()

    @property
    def closing(self) -> bool:
        return self._closing.is_set()

    async def ask(self, body: Mapping[str, Any], read: Callable[[str], T], about: str = "") -> T:
        """What `read` makes of the answer.

        Args:
            body: JSON.
            read: raises ValueError for an answer that is not whole or not what was asked for, and
                ServerError for one that another try would not mend.
            about: stands behind the address in errors.

        Raises:
            ServerError: no answer that can be read, after all tries.
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
                # Jitter on top: else all who were told to wait come back in the same instant.
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
            raise _Fault(f"no whole answer within {self.timeout:g} s") from None
        except httpx2.RequestError as error:
            # `from None`: the error holds the request, and the request the key.
            what = f"{type(error).__name__}: {error}"
            raise _Fault(_without(key, what)) from None
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
    """The API key that an environment variable holds; empty without a variable.

    Raises:
        ServerError: it holds none that can be sent.
    """
    if key_env is None:
        return ""
    key = os.environ.get(key_env, "").strip()
    if not (key and key.isascii() and key.isprintable()):
        raise ServerError(
            f"key_env is {key_env!r}, but that environment variable is "
            f"{'no key (it has characters that none has)' if key else 'not set or empty'}."
        )
    return key


def authorization(key: str) -> dict[str, str]:
    """The header that carries an API key; none for an empty one."""
    return {"Authorization": f"Bearer {key}"} if key else {}


async def for_each(todo: Iterable[T], do: Callable[[T], Awaitable[None]], at_once: int) -> None:
    """`do` for each of them, so many at a time; they are drawn from only as one of these comes free.

    Raises:
        Exception: the first error of all; nothing more is begun after it.
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
    """Whether an address is of this machine; a proxy that the environment names is not for these."""
    return httpx2.URL(url).host in ("localhost", "127.0.0.1", "::1")


def checked_url(url: str, name: str) -> httpx2.URL:
    """The address of a server, without a key in it.

    Args:
        name: of the setting, for errors.

    Raises:
        ServerError: it is none, or holds what may be a secret.
    """
    try:
        found = httpx2.URL(url)
    except httpx2.InvalidURL as error:
        raise ServerError(f"{name} {url!r} is no URL: {error}.") from None
    if found.userinfo or found.query:
        # Not shown: it may well be a secret.
        raise ServerError(
            f"{name} holds a user name, a password or a query (`?...`); expected "
            "http(s)://host[:port][/path]. A key belongs into the environment: see key_env."
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
        return _Fault(f"{what}; it asks to come back after {wait:.0f} s", final=True)
    return _Fault(what, wait=wait)


def _seconds(retry_after: str | None) -> float:
    """Of a Retry-After header: seconds or a date (RFC 9110, 10.2.3); 0 for what is neither."""
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
