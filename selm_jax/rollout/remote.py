"""Generates answers with a vLLM or SGLang server instead of the built-in engine.

    with Server(settings, folder, ...) as server:    # starts it, if there is a command
        responses = server.generate(requests, seed=42, iteration=1)

The server gets token ids and must return token ids, so that training uses exactly the tokens that
were sampled. It must serve the policy under a path that contains a digest of its bytes (`named`).
This is checked before each part, so no iteration is ever answered by the policy of another.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import shlex
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import httpx2
import numpy as np

from selm_jax.config import Remote
from selm_jax.rollout import server_log, serving
from selm_jax.rollout.dialects import DIALECTS, Said, Served, kept_logps
from selm_jax.rollout.requests import Request, Response
from selm_jax.rollout.sampling import Sampling
from selm_jax.shell import artifacts, processes
from selm_jax.shell import mirror as mirrors
from selm_jax.shell.endpoint import (
    Endpoint,
    ServerError,
    Tries,
    api_key,
    checked_url,
    for_each,
)
from selm_jax.shell.pace import here
from selm_jax.weights.sources import cache_root

_LOOK_EVERY = 0.5  # seconds between two checks whether the server answers
_LAST_BREATH_SECONDS = 5.0  # how long to wait for the end of a server that answers no more
_TERMINATE_SECONDS = 30.0  # how long a server may take to end when it is told to
_BEFORE_SECONDS = 60.0  # how long to wait for the end of a server that a killed run left behind


def named(folder: Path) -> Path:
    """Makes a link to a policy's folder, named by the digest of its files, and returns the link.

    The folder's own path is not enough: if an iteration is run again, it contains another policy.
    """
    served = cache_root() / "served" / artifacts.digest(folder)
    artifacts.link(served, mirrors.need(folder).resolve())
    return served


def check(settings: Remote, tokens: int) -> None:
    """Checks the settings of a generation server, and the server itself if it is running.

    Args:
        tokens: the most tokens of a prompt with its answer.

    Raises:
        ServerError: the url is not valid, the environment lacks the API key, or the server is of
            another kind or has too short a context.
    """
    root = str(checked_url(settings.url, "rollout.remote.url")).rstrip("/")
    try:
        api_key(settings.key_env)
    except ServerError as error:
        raise ServerError(f"rollout.remote: {error}") from None
    if settings.command is None:
        for each in (serving.served(settings, root) or {}).values():
            serving.check_context(root, each, tokens)


class _Ended(ServerError):
    """The server that was started here has ended."""


class Server:
    """A context manager for a server that serves the policy.

    Entering the context waits until the server serves the folder; leaving it ends the server if it
    was started here.

    Args:
        settings: `rollout.remote` of the experiment.
        folder: the policy's folder, by the path that the server must serve.
        log: the file that the output of a started server is appended to.
        sampling: how the samples are drawn.
        longest_prompt: the length of the longest prompt, in tokens.
        max_new_tokens, stop_ids: where an answer ends.
        vocabulary: the size of the vocabulary.
        say: called with a message while the server is not ready.

    Attributes:
        tries: counts of requests and retries.
        version: the server's version, such as "vllm 0.32.0", after entering; None if unknown.

    Raises:
        ServerError: the settings are not valid. On entering: there is no server, it serves another
            model or has too short a context, or the command ended.
    """

    def __init__(
        self,
        settings: Remote,
        folder: Path,
        *,
        log: Path,
        sampling: Sampling,
        longest_prompt: int,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        vocabulary: int,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.settings, self.dialect = settings, DIALECTS[settings.engine]
        self.folder, self.log, self._say = folder, log, say
        self.tries = Tries()
        self.version: str | None = None
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.longest_prompt = longest_prompt
        self.stop_ids, self.vocabulary = tuple(stop_ids), vocabulary
        self._root = str(checked_url(settings.url, "rollout.remote.url")).rstrip("/")
        self._process: subprocess.Popen[bytes] | None = None
        self._log_began = 0  # bytes of the log before the server was started
        self._fault = ""  # the first fault of the current requests

    def __enter__(self) -> Server:  # noqa: PYI034  (beartype takes no Self on a method)
        if self.settings.command is not None:
            self._start(self.settings.command)
        try:
            self._wait()
            self.version = self._tells_version()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def generate(
        self,
        requests: Sequence[Request],
        *,
        seed: int,
        iteration: int,
        progress: Callable[[int, int], None] = lambda responses, tokens: None,
    ) -> list[Response]:
        """Answers every request, in the order (index, sample); see `engine.Engine.generate`.

        If one answer fails, the others are cancelled.

        Raises:
            ServerError: an answer failed or cannot come from this model, or the server now serves
                another model.
        """
        self._fault = ""
        return asyncio.run(self._answers(self._wait(), requests, seed, iteration, progress))

    async def _answers(self, name, requests, seed, iteration, progress) -> list[Response]:
        s, found = self.settings, []
        todo = [(request, sample) for request in requests for sample in request.wanted()]
        endpoint = Endpoint(
            self._root + self.dialect.generate, key_env=s.key_env, concurrency=s.concurrency,
            timeout=s.timeout, retries=s.retries, on_fault=self._check_alive,
        )  # fmt: skip
        endpoint.tries = self.tries

        async def ask(one: tuple[Request, int]) -> None:
            request, sample = one
            number = _seed(seed, iteration, request.drawn_by, sample) if s.seeds else None
            body = self.dialect.body(
                name, request.prompt, self.sampling if sample else None, self.max_new_tokens,
                self.stop_ids, number,
            )  # fmt: skip
            said = await endpoint.ask(body, self._read)
            tokens, finish = self._ended(said)
            logps = kept_logps(self.dialect, said, len(tokens), self.sampling if sample else None)
            response = Response(request.index, sample, tokens, finish, *logps)
            found.append(response)
            progress(1, len(response.tokens))

        try:
            async with endpoint:
                await for_each(todo, ask, s.concurrency)
        except _Ended:
            raise
        except ServerError as error:
            if self._process is not None:  # its end may be the cause of the error
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_LAST_BREATH_SECONDS)
                self._check_alive(str(error))
            known = server_log.advice(str(error))
            raise ServerError(f"{error}{known and f'. {known.rstrip()}'}") from None
        return sorted(found, key=lambda r: (r.index, r.sample))

    def _read(self, text: str) -> Said:
        try:
            said = self.dialect.read(json.loads(text))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"not in the format of {self.settings.engine} ({error!r})") from None
        if not all(isinstance(x, int) and 0 <= x < self.vocabulary for x in said.tokens):
            raise ServerError(
                "not from this model: it has token ids beyond the model's "
                f"{self.vocabulary:,} tokens"
            )
        return said

    def _ended(self, said: Said) -> tuple[tuple[int, ...], str]:
        """Returns (token ids with their stop token, finish reason as from the engine)."""
        tokens = said.tokens
        # SGLang says "length" if the last allowed token is a stop token.
        if said.finish in ("stop", "length") and tokens and tokens[-1] in self.stop_ids:
            return tokens, "stop"
        if said.finish == "length" and len(tokens) == self.max_new_tokens:
            return tokens, "length"
        if said.finish == "stop" and said.end in self.stop_ids:
            return (*tokens, said.end), "stop"
        expected = (
            f"{self.max_new_tokens} tokens, or a stop token ({', '.join(map(str, self.stop_ids))})"
        )
        raise ServerError(
            f"{self._root}: an answer of {len(tokens)} tokens finished ({said.finish}, by token "
            f"{said.end}); expected {expected}. Check that the server's context is long enough for "
            "prompt and answer, and that it takes no limit or stop token from "
            "generation_config.json"
        )

    # --- the server itself ------------------------------------------------------------------------

    def _start(self, command: str) -> None:
        parts = [part.replace("{model}", str(self.folder)) for part in shlex.split(command)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._wait_for_the_one_before(log.fileno())
            self._log_began = server_log.size_of(self.log)
            self._process = processes.start(parts, log)

    def _wait_for_the_one_before(self, log: int) -> None:
        """Waits until the server that a killed run left behind has ended.

        Every process whose output is the log, even a grandchild, keeps the log locked.
        """
        until = time.monotonic() + _BEFORE_SECONDS
        while (other := self._serves()) is not None or not _locked(log):
            if time.monotonic() < until:
                time.sleep(_LOOK_EVERY)
                continue
            if other is None:
                raise ServerError(
                    f"a server that was started before has not ended after {_BEFORE_SECONDS:g} s; "
                    f"its output is {self.log}. Stop that server"
                )
            raise ServerError(
                f"a server already answers at {self._root}, before rollout.remote.command was run "
                f"(it serves {serving.listed(other)}). Stop that server, or remove the command and "
                "serve the policy yourself"
            )

    def _check_alive(self, fault: str = "") -> None:
        """Raises _Ended if the server was started here and has ended.

        `fault` is the failure that led to this check; the message contains the first of them.
        """
        self._fault = self._fault or fault
        if self._process is None or (status := self._process.poll()) is None:
            return
        first = f"The first fault of a request was {self._fault}. " if self._fault else ""
        raise _Ended(
            f"rollout.remote.command ended with status {status}. {first}"
            f"{server_log.story(self.log, self._log_began)}"
        )

    def _wait(self) -> str:
        """Waits until the server serves the policy; returns the model name to use in requests."""
        until, told = time.monotonic() + self.settings.start_seconds, None
        how = self.dialect.example.format(
            model=self.folder, port=httpx2.URL(self._root).port or 8000
        )
        while True:
            self._check_alive()
            found = self._serves()
            for name, served in (found or {}).items():
                if served.folder == str(self.folder):
                    serving.check_context(
                        self._root, served, self.longest_prompt + self.max_new_tokens
                    )
                    return name
            what = f"{self._root} to serve {self.folder}"
            if found and self._process is not None:
                raise ServerError(
                    f"{self._root} serves {serving.listed(found)}, but rollout.remote.command "
                    f"should serve {self.folder}. Check that the command contains {{model}} and "
                    "the port of the url"
                )
            there = (
                "nothing answers there" if found is None else f"it serves {serving.listed(found)}"
            )
            if time.monotonic() > until:
                raise ServerError(
                    f"waited {self.settings.start_seconds:g} s for {what}, but {there}. Start the "
                    f"server, for example with: {how}"
                )
            if told != there:
                way = "" if self._process is not None else f". Start it, for example with: {how}"
                self._say(f"waiting for {what}; {there} now{way}")
                told = there
            here.sign()
            time.sleep(_LOOK_EVERY)

    def _serves(self) -> dict[str, Served] | None:
        return serving.served(self.settings, self._root)

    def _tells_version(self) -> str | None:
        answer = serving.get(self.settings, self._root + self.dialect.about)
        if answer is None or answer.status_code != 200:
            return None
        try:
            return f"{self.settings.engine} {answer.json()['version']}"
        except (ValueError, KeyError, TypeError):
            return None

    def _stop(self) -> None:
        if self._process is not None:
            processes.stop(self._process, _TERMINATE_SECONDS)
            self._process = None


def _seed(*numbers: int) -> int:
    """The seed of one response, below 2^31."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
