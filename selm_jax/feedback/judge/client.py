"""A client of OpenAI-compatible servers (vLLM, SGLang, Ollama, hosted) that caches paid answers.

    async with Client("judge-model", cache=file, base_url="http://127.0.0.1:8000/v1") as client:
        completion = await client.complete([{"role": "user", "content": "Hello"}], max_tokens=9)

It does not depend on rankers, so evaluations use it too.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from selm_jax.feedback.judge.answer import Completion, parse_completion
from selm_jax.feedback.judge.budget import Budget, Calls, JudgeError, Timeout, check_numbers
from selm_jax.feedback.judge.cache import AnswerCache, request_key
from selm_jax.shell.endpoint import Endpoint, ServerError, api_key, checked_url, for_each
from selm_jax.shell.ranges import Count, Natural, NonNegative

T = TypeVar("T")
Messages = Sequence[Mapping[str, str]]


class Client:
    """A client for one model of one server that never sends the same request twice.

    An answer is in the cache on disk before it is returned. If two tasks make the same request at
    once, it is sent once. Temporary faults are retried (`endpoint.Endpoint`). An answer lost on the
    way may have been paid for, which no client can know; only answers that arrived are counted.

    The API key is read from the environment for each request and is not stored. If the server
    sends it back, it is removed from what is stored and shown.

    Args:
        model: the model's name on the server.
        cache: file of the answers; see `cache.AnswerCache`. It distinguishes models by name only:
            use two files if two servers have different models of the same name.
        base_url: such as `http://127.0.0.1:8000/v1`; None uses $OPENAI_BASE_URL.
        key_env: name of the environment variable that contains the API key; None sends no key.
        concurrency: maximum number of requests under way at once.
        timeout: seconds for one whole answer.
        retries: maximum number of retries of one request.
        backoff: seconds before the first retry.
        budget: limits on what may be spent; it counts on when the client is opened again.

    Raises:
        JudgeError: a setting is invalid, or the environment variable of the key is not set.
    """

    def __init__(
        self,
        model: str,
        *,
        cache: Path,
        base_url: str | None = None,
        key_env: str | None = None,
        concurrency: Count = 16,
        timeout: Timeout = 120.0,
        retries: Natural = 6,
        backoff: NonNegative = 1.0,
        budget: Budget | None = None,
    ):
        how = {"timeout": timeout, "retries": retries, "backoff": backoff}
        check_numbers(Client.__init__, how | {"concurrency": concurrency})
        self.model = model
        self.url = _chat_url(base_url)
        self.concurrency = concurrency
        self.budget = Budget() if budget is None else budget
        self.counts = Calls()
        self._endpoint = Endpoint(
            self.url, key_env=key_env, concurrency=concurrency, timeout=timeout, retries=retries,
            backoff=backoff,
        )  # fmt: skip
        try:
            api_key(key_env)  # so that a missing key is found before any work
        except ServerError as error:
            raise JudgeError(f"judge: {error}") from None
        self._cache = AnswerCache(cache)
        self.cache = self._cache.file
        self._under_way: dict[str, asyncio.Task[Completion]] = {}
        self._unusable: dict[str, Completion] = {}  # so that a process requests each only once

    async def __aenter__(self) -> Client:  # noqa: PYI034  (beartype takes no Self on a method)
        self._cache.__enter__()
        self._endpoint.tries = self.counts = Calls()
        self._slots = asyncio.Semaphore(self.concurrency)
        await self._endpoint.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # Requests under way cost money: whatever happened, wait for their answers and store them.
        # Requests that wait for a retry give up.
        self._endpoint.close_soon()
        await asyncio.gather(*self._under_way.values(), return_exceptions=True)
        await self._endpoint.__aexit__(kind, error, trace)
        self._cache.__exit__(kind, error, trace)

    async def complete(
        self,
        messages: Messages,
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_logprobs: int | None = None,
        draw: int = 0,
        extra: Mapping[str, Any] | None = None,
        usable: Callable[[Completion], bool] = lambda answer: True,
    ) -> Completion:
        """The model's answer to a conversation, from the cache if the cache has the answer.

        Args:
            messages: mappings `{"role": ..., "content": ...}`.
            max_tokens, temperature: None uses the server's defaults.
            top_logprobs: for how many of the most likely tokens to request log-probabilities, at
                each token of the answer.
            draw: number of the sample, if several samples for the same request are wanted.
            extra: more fields of the request's body, such as `max_completion_tokens`. A value of
                None removes a field, such as `max_tokens` for a server that refuses it.
            usable: whether an answer can be used. This client remembers unusable answers but does
                not write them to the cache, so that a later run requests them again.

        Raises:
            JudgeError: the server gave no answer.
            BudgetExceeded: the request might exceed the budget.
        """
        body = self._body(messages, max_tokens, temperature, top_logprobs, extra)
        key = request_key(body, draw)
        self.counts.asked += 1
        if key in self._under_way:
            self.counts.shared += 1
        else:
            if (known := self._known(key, usable)) is not None:
                self.counts.cache_hits += 1
                return known
            task = asyncio.create_task(self._pay(key, body, usable))
            task.add_done_callback(lambda _: self._under_way.pop(key))
            self._under_way[key] = task
        # Shielded: if the caller is cancelled, the paid answer is still stored.
        return await asyncio.shield(self._under_way[key])

    def _known(self, key: str, usable: Callable[[Completion], bool]) -> Completion | None:
        """Looks up an answer in memory and in the cache file; None if there is none."""
        if key in self._unusable:
            return self._unusable[key]
        if not (stored := self._cache.get(key)):
            return None
        answer = Completion.restore(stored)
        if usable(answer):
            return answer
        self._cache.remove(key)  # written by an older version, or before the way of reading changed
        return None

    async def complete_all(
        self,
        conversations: Iterable[Messages],
        *,
        read: Callable[[int, Completion], T] = lambda _, answer: answer,
        **sampling: Any,
    ) -> list[T]:
        """Calls `complete` for each conversation; returns the answers in the same order.

        After the first error no more requests are sent; answers under way are still stored before
        the client's `async with` ends.

        Args:
            conversations: an iterable; the next item is taken only when a request can be sent.
            read: `(number of the conversation, answer)` -> the value to return for it; called as
                answers arrive. If it raises, no more requests are sent.
            sampling: the other arguments of `complete`, including `usable`.

        Raises:
            JudgeError: the first error of any conversation; see `complete`.
        """
        answers: dict[int, T] = {}

        async def ask(numbered: tuple[int, Messages]) -> None:
            i, messages = numbered
            answers[i] = read(i, await self.complete(messages, **sampling))

        await for_each(enumerate(conversations), ask, self.concurrency)
        return [answers[i] for i in sorted(answers)]

    def forget(
        self,
        conversations: Iterable[Messages],
        which: Callable[[Completion], bool],
        *,
        max_tokens: int | None = None,
        temperature: float | None = None,
        top_logprobs: int | None = None,
        draw: int = 0,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Deletes the cached answers for which `which` is true; later calls ask the server again.

        The client must not be open.

        Args:
            conversations, and the rest: the same arguments that `complete` was called with.
        """
        with self._cache:
            for messages in conversations:
                body = self._body(messages, max_tokens, temperature, top_logprobs, extra)
                key = request_key(body, draw)
                stored = self._cache.get(key)
                if stored and which(Completion.restore(stored)):
                    self._cache.remove(key)

    def _body(
        self,
        messages: Messages,
        max_tokens: int | None,
        temperature: float | None,
        top_logprobs: int | None,
        extra: Mapping[str, Any] | None,
    ) -> dict[str, Any]:
        fields = {
            "model": self.model,
            "messages": [dict(each) for each in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "logprobs": None if top_logprobs is None else True,
            "top_logprobs": top_logprobs,
            **(extra or {}),
        }
        return {name: value for name, value in fields.items() if value is not None}

    async def _pay(
        self, key: str, body: Mapping[str, Any], usable: Callable[[Completion], bool]
    ) -> Completion:
        async with self._slots:
            if self._endpoint.closing:
                raise JudgeError("judge: the client was closed before the request was sent.")
            self.budget.reserve()
            usage = None
            try:
                completion = await self._ask(body)
                usage = completion.usage
                if usable(completion):
                    self._cache.put(key, body, dataclasses.asdict(completion))
                else:
                    self._unusable[key] = completion
            finally:
                self.budget.release(usage)
        self.counts.answers += 1
        if usage is not None:
            self.counts.prompt_tokens += usage.prompt
            self.counts.completion_tokens += usage.completion
            return completion
        self.counts.without_usage += 1
        if self.budget.limited:
            raise JudgeError(
                f"{self.url}: the answer has no `usage`, so the budget cannot be enforced. Remove "
                "max_total_tokens and max_cost, or use a server that reports token counts."
            )
        return completion

    async def _ask(self, body: Mapping[str, Any]) -> Completion:
        try:
            return await self._endpoint.ask(body, _read, about=f", model {self.model!r}")
        except ServerError as error:
            raise JudgeError(
                f"{error}.{_way_out(str(error), body)} All answers that arrived are in the cache. "
                "Fix the cause and run again to continue from there."
            ) from None


def _read(text: str) -> Completion:
    try:
        return parse_completion(text)
    except ValueError as error:
        raise ValueError(f"not a chat completion ({error})") from None


def _way_out(error: str, body: Mapping[str, Any]) -> str:
    """Advice on settings, for a server that refuses a field of the request; "" for other errors."""
    if "HTTP status 4" not in error:
        return ""
    if "max_completion_tokens" in error and "max_tokens" in body:
        most = body["max_tokens"]
        return (
            " This server expects max_completion_tokens instead of max_tokens: set "
            f"`extra: {{max_tokens: null, max_completion_tokens: {most}}}` in the judge's "
            "settings, or pass --extra max_tokens=null --extra max_completion_tokens="
            f"{most} to a benchmark of `selm eval`. Allow for the model's thoughts before its "
            "answer."
        )
    for name in ("temperature", "logprobs", "top_logprobs", "max_tokens"):
        if name in body and re.search(rf"\b{name}\b", error):
            return (
                f" If this server does not support {name}, leave it out of the request: "
                f"`extra: {{{name}: null}}` in the judge's settings, or --extra {name}=null for a "
                "benchmark of `selm eval`."
            )
    return ""


def _chat_url(base_url: str | None) -> str:
    base = base_url or os.environ.get("OPENAI_BASE_URL")
    if not base:
        raise JudgeError(
            "judge: no server is given. Set base_url, such as http://127.0.0.1:8000/v1, or the "
            "environment variable OPENAI_BASE_URL."
        )
    try:
        url = checked_url(base, "base_url")
    except ServerError as error:
        raise JudgeError(f"judge: {error}") from None
    path = url.path.rstrip("/") or "/v1"
    return str(url.copy_with(path=f"{path}/chat/completions"))
