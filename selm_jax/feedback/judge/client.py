"""A client of OpenAI-compatible servers (vLLM, SGLang, Ollama, hosted) that loses no paid answer.

    async with Client("judge-model", cache=file, base_url="http://127.0.0.1:8000/v1") as client:
        completion = await client.complete([{"role": "user", "content": "Hello"}], max_tokens=9)

It knows nothing of rankers; evaluations use it as it is.
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
    """Asks one model of one server, never the same thing twice.

    An answer is in the cache, on disk, before it is returned. The same request from two tasks at
    once is sent once. Faults of the way are tried again (`endpoint.Endpoint`). An answer lost on the
    way may have been paid for: no client can know; only what arrived is counted.

    The API key is read from the environment for each request and kept nowhere. Should the server
    send it back, it is cut out of what is stored and shown.

    Args:
        model: the name the server knows the model by.
        cache: file of the answers; see `judge_cache`. It tells models apart by name alone: give two
            servers that call different models by one name two files.
        base_url: such as `http://127.0.0.1:8000/v1`; None takes $OPENAI_BASE_URL.
        key_env: name of the environment variable that holds the API key; None sends no key.
        concurrency: most requests under way at once.
        timeout: seconds for one whole answer.
        retries: most times one request is sent again.
        backoff: seconds before the first retry.
        budget: what may be spent; kept over several openings of the client.

    Raises:
        JudgeError: a setting that cannot be used, or the key's variable is not set.
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
        self._unusable: dict[str, Completion] = {}  # so that one process asks for each only once

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
        # Requests under way are paid for: whatever happened, their answers are waited for and
        # stored. Those that wait for another try give up.
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
        """The model's answer to a conversation, from the cache if it is there.

        Args:
            messages: `{"role": ..., "content": ...}` each.
            max_tokens, temperature: the server's defaults where None.
            top_logprobs: how many of the likeliest tokens to tell for each token of the answer.
            draw: number of the sample, where several of one request are wanted.
            extra: more fields of the request's body, such as `max_completion_tokens`; None takes
                a field away, such as `max_tokens` for a server that refuses it.
            usable: whether the answer can be used. One that cannot is no use to a later run either:
                it is remembered by this client alone and never written to the cache.

        Raises:
            JudgeError: the answer could not be had.
            BudgetExceeded: it may not be paid for.
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
        # Shielded: a caller that is cancelled does not throw a paid answer away.
        return await asyncio.shield(self._under_way[key])

    def _known(self, key: str, usable: Callable[[Completion], bool]) -> Completion | None:
        """The answer that is there already, if there is one."""
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
        """`complete` for each conversation; answers in the order of the conversations.

        After the first error nothing more is sent; answers under way are still stored (by the end
        of the client's `async with`).

        Args:
            conversations: drawn from only as requests come free.
            read: `(number of the conversation, answer)` -> what is kept of the answer; called as
                answers arrive. Its errors stop the rest as others do.
            sampling: as in `complete`, `usable` among it.

        Raises:
            JudgeError: as `complete`: the first error of all.
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
        """Takes answers for which `which` is true out of the cache, so that they are asked again.

        Args:
            conversations, and the rest: as `complete` was asked. The client is not open.
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
                f"{self.url}: the answer has no `usage`, so the budget cannot be kept. Take away "
                "max_total_tokens and max_cost, or use a server that counts its tokens."
            )
        return completion

    async def _ask(self, body: Mapping[str, Any]) -> Completion:
        try:
            return await self._endpoint.ask(body, _read, about=f", model {self.model!r}")
        except ServerError as error:
            raise JudgeError(
                f"{error}.{_way_out(str(error), body)} Answers that came are in the cache: once this is mended, run again to go "
                "on from there."
            ) from None


def _read(text: str) -> Completion:
    try:
        return parse_completion(text)
    except ValueError as error:
        raise ValueError(f"no chat completion ({error})") from None


def _way_out(error: str, body: Mapping[str, Any]) -> str:
    """What to set where a server refuses a field of the request; "" where it does not say so."""
    if "HTTP status 4" not in error:
        return ""
    if "max_completion_tokens" in error and "max_tokens" in body:
        most = body["max_tokens"]
        return (
            " This server wants max_completion_tokens in place of max_tokens: set "
            f"`extra: {{max_tokens: null, max_completion_tokens: {most}}}` in the judge's settings, "
            f"or give --extra max_tokens=null --extra max_completion_tokens={most} to a benchmark of "
            "`selm eval`, with room for what the model thinks before it answers."
        )
    for name in ("temperature", "logprobs", "top_logprobs", "max_tokens"):
        if name in body and re.search(rf"\b{name}\b", error):
            return (
                f" If this server does not take {name}, leave it out of the request: "
                f"`extra: {{{name}: null}}` in the judge's settings, or --extra {name}=null for a "
                "benchmark of `selm eval`."
            )
    return ""


def _chat_url(base_url: str | None) -> str:
    base = base_url or os.environ.get("OPENAI_BASE_URL")
    if not base:
        raise JudgeError(
            "judge: no server. Set base_url, such as http://127.0.0.1:8000/v1, or the environment "
            "variable OPENAI_BASE_URL."
        )
    try:
        url = checked_url(base, "base_url")
    except ServerError as error:
        raise JudgeError(f"judge: {error}") from None
    path = url.path.rstrip("/") or "/v1"
    return str(url.copy_with(path=f"{path}/chat/completions"))
