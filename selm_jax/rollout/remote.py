"""Answers from a vLLM or an SGLang server, in place of the engine here.

    with Server(settings, folder, ...) as server:    # starts it, if there is a command
        responses = server.generate(requests, seed=42, iteration=1)

The server is given token ids and has to return token ids: what is trained on is what was said, and no
tokenizer stands between. It has to serve the policy under a path that names its bytes (`named`), and is
asked for it before each part, so that no iteration is ever answered by the policy of another.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import shlex
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import httpx2
import numpy as np

from selm_jax import artifacts
from selm_jax.config import Remote
from selm_jax.endpoint import (
    Endpoint,
    ServerError,
    Tries,
    api_key,
    authorization,
    checked_url,
    for_each,
    is_here,
)
from selm_jax.rollout import keeper
from selm_jax.rollout.engine import Request, Response
from selm_jax.rollout.sampling import Sampling
from selm_jax.weights.sources import cache_root

_LOOK_EVERY = 0.5  # seconds between two looks whether the server is there
_LAST_WORDS = 2000  # characters of a server's log that an error shows
_TERMINATE_SECONDS = 30.0  # for a server to end when it is told to
_BEFORE_SECONDS = 60.0  # for one that a killed run has left to end


class Said(NamedTuple):
    """One answer as a server tells it.

    Attributes:
        tokens: ids; the token that ended it is their last or missing, as the server likes.
        finish: "stop", "length", or whatever else it says.
        end: the token that ended it, if it is told.
    """

    tokens: tuple[int, ...]
    finish: str
    end: int | None


class Dialect(NamedTuple):
    """How a kind of server is spoken to.

    Attributes:
        generate, model: paths of its addresses.
        body: (name, prompt, sampling or None for the greedy answer, tokens at most, stop ids, seed)
            to the JSON of a request.
        read: the JSON of an answer to what was said.
        served: the JSON of `model` to the folders that it serves, by the names that requests give.
        example: a command that starts it.
    """

    generate: str
    model: str
    body: Callable[[str, Sequence[int], Sampling | None, int, Sequence[int], int], dict[str, Any]]
    read: Callable[[Any], Said]
    served: Callable[[Any], dict[str, str]]
    example: str


def _vllm_body(name, prompt, sampling, most, stop_ids, seed) -> dict[str, Any]:
    return {
        "model": name,
        "prompt": list(prompt),
        "max_tokens": most,
        "seed": seed,
        # Its own idea of an end is the model folder's eos token; ours may be more than that one.
        "ignore_eos": True,
        "stop_token_ids": list(stop_ids),
        "return_token_ids": True,
        # All of them, or it takes those that it does not find from generation_config.json.
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        **_filters(sampling),
    }


def _sglang_body(name, prompt, sampling, most, stop_ids, seed) -> dict[str, Any]:
    # It takes no seed but in a mode of its own, and with `ignore_eos` no stop ids either.
    parameters = {
        "max_new_tokens": most,
        "stop_token_ids": list(stop_ids),
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        **_filters(sampling),
    }
    return {"input_ids": list(prompt), "sampling_params": parameters}


def _filters(sampling: Sampling | None) -> dict[str, Any]:
    if sampling is None:
        return {"temperature": 0.0, "top_k": -1, "top_p": 1.0, "min_p": 0.0}
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or -1,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
    }


def _vllm_said(tree: Any) -> Said:
    choice = tree["choices"][0]
    if choice.get("token_ids") is None:
        raise ServerError("without token ids: this needs a vLLM that knows `return_token_ids`")
    end = choice.get("stop_reason")
    return Said(tuple(choice["token_ids"]), choice["finish_reason"], _token(end))


def _sglang_said(tree: Any) -> Said:
    if tree.get("output_ids") is None:
        raise ServerError("without token ids: this needs an SGLang that returns `output_ids`")
    finish = tree["meta_info"]["finish_reason"]
    return Said(tuple(tree["output_ids"]), finish["type"], _token(finish.get("matched")))


def _token(end: Any) -> int | None:
    return end if isinstance(end, int) else None


DIALECTS: Mapping[str, Dialect] = {
    "vllm": Dialect(
        "/v1/completions",
        "/v1/models",
        _vllm_body,
        _vllm_said,
        lambda tree: {each["id"]: each.get("root") or each["id"] for each in tree["data"]},
        "vllm serve {model} --port 8000",
    ),
    "sglang": Dialect(
        "/generate",
        "/get_model_info",
        _sglang_body,
        _sglang_said,
        lambda tree: {"": tree["model_path"]},
        "python -m sglang.launch_server --model-path {model} --port 8000",
    ),
}


def named(folder: Path) -> Path:
    """A link to a policy's folder whose name is the digest of its bytes, made if it is not there.

    The next policy may lie in the same folder: when an iteration is done anew.
    """
    link = cache_root() / "served" / artifacts.digest(folder)
    link.parent.mkdir(parents=True, exist_ok=True)
    partial = link.with_name(f"{link.name}.{os.getpid()}")
    partial.unlink(missing_ok=True)
    partial.symlink_to(folder.resolve())
    os.replace(partial, link)
    return link


def check(settings: Remote) -> None:
    """Looks at what a server needs before any work is done.

    Raises:
        ServerError: a url that is none, or an API key that the environment lacks.
    """
    checked_url(settings.url, "rollout.remote.url")
    try:
        api_key(settings.key_env)
    except ServerError as error:
        raise ServerError(f"rollout.remote: {error}") from None


class Server:
    """A server that has the policy. Entering waits until it serves the folder; leaving ends it, if it
    was started here.

    Args:
        settings: `rollout.remote` of the experiment.
        folder: of the policy, as the server is to name it.
        log: file for what a started server says; it is added to.
        sampling: of the answers that are drawn.
        max_new_tokens, stop_ids: when an answer ends.
        vocabulary: how many tokens there are.
        say: told in words what is waited for.

    Attributes:
        tries: what became of the requests.

    Raises:
        ServerError: settings that cannot be; when it is entered: no server, or one that serves
            another model, or the command ended.
    """

    def __init__(
        self,
        settings: Remote,
        folder: Path,
        *,
        log: Path,
        sampling: Sampling,
        max_new_tokens: int,
        stop_ids: Sequence[int],
        vocabulary: int,
        say: Callable[[str], None] = lambda text: None,
    ):
        self.settings, self.dialect = settings, DIALECTS[settings.engine]
        self.folder, self.log, self._say = folder, log, say
        self.tries = Tries()
        self.sampling, self.max_new_tokens = sampling, max_new_tokens
        self.stop_ids, self.vocabulary = tuple(stop_ids), vocabulary
        self._root = str(checked_url(settings.url, "rollout.remote.url")).rstrip("/")
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Server:  # noqa: PYI034  (beartype takes no Self on a method)
        if self.settings.command is not None:
            self._start(self.settings.command)
        try:
            self._wait()
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

        An answer that fails stops the rest.

        Raises:
            ServerError: an answer could not be had, or is none of this model, or the server has
                another one by now.
        """
        return asyncio.run(self._answers(self._wait(), requests, seed, iteration, progress))

    async def _answers(self, name, requests, seed, iteration, progress) -> list[Response]:
        s, found = self.settings, []
        todo = [(request, sample) for request in requests for sample in request.wanted()]
        endpoint = Endpoint(
            self._root + self.dialect.generate, key_env=s.key_env, concurrency=s.concurrency,
            timeout=s.timeout, retries=s.retries,
        )  # fmt: skip
        endpoint.tries = self.tries

        async def ask(one: tuple[Request, int]) -> None:
            request, sample = one
            number = _seed(seed, iteration, request.drawn_by, sample)
            body = self.dialect.body(
                name, request.prompt, self.sampling if sample else None, self.max_new_tokens,
                self.stop_ids, number,
            )  # fmt: skip
            said = await endpoint.ask(body, self._read)
            response = Response(request.index, sample, *self._ended(said))
            found.append(response)
            progress(1, len(response.tokens))

        async with endpoint:
            await for_each(todo, ask, s.concurrency)
        return sorted(found, key=lambda r: (r.index, r.sample))

    def _read(self, text: str) -> Said:
        try:
            said = self.dialect.read(json.loads(text))
        except (KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(
                f"not of the form that {self.settings.engine} has ({error!r})"
            ) from None
        if not all(isinstance(x, int) and 0 <= x < self.vocabulary for x in said.tokens):
            raise ServerError(f"with token ids beyond the model's {self.vocabulary:,} tokens")
        return said

    def _ended(self, said: Said) -> tuple[tuple[int, ...], str]:
        """Token ids with their end, and how they ended, as the engine here would say it."""
        tokens = said.tokens
        # SGLang says "length" of one whose end is the last token that it may have.
        if said.finish in ("stop", "length") and tokens and tokens[-1] in self.stop_ids:
            return tokens, "stop"
        if said.finish == "length" and len(tokens) == self.max_new_tokens:
            return tokens, "length"
        if said.finish == "stop" and said.end in self.stop_ids:
            return (*tokens, said.end), "stop"
        expected = (
            f"{self.max_new_tokens} tokens, or an end of {', '.join(map(str, self.stop_ids))}"
        )
        raise ServerError(
            f"{self._root}: an answer of {len(tokens)} tokens is finished ({said.finish}, by token "
            f"{said.end}); expected {expected}. Is the server's context too short for prompt and "
            "answer, or does it take a bound or an end from generation_config.json?"
        )

    # --- the server itself ------------------------------------------------------------------------

    def _start(self, command: str) -> None:
        parts = [part.replace("{model}", str(self.folder)) for part in shlex.split(command)]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._wait_for_the_one_before(log.fileno())
            self._process = keeper.start(parts, log)

    def _wait_for_the_one_before(self, log: int) -> None:
        """Returns when no server of this run is there any more, which a killed one leaves behind for
        a while. Whoever has the log as its output, and be it a child's child, holds the log's lock."""
        until = time.monotonic() + _BEFORE_SECONDS
        while (other := self._serves()) is not None or not _locked(log):
            if time.monotonic() < until:
                time.sleep(_LOOK_EVERY)
                continue
            if other is None:
                raise ServerError(
                    f"a server that was started before has not ended after {_BEFORE_SECONDS:g} s; its "
                    f"output is {self.log}. Stop it"
                )
            raise ServerError(
                f"{self._root} answers already, before rollout.remote.command was run (it serves "
                f"{_listed(other)}). Stop that server, or take the command away and serve the policy "
                "yourself"
            )

    def _wait(self) -> str:
        """Returns the name of the policy for requests, as soon as the server has one."""
        until, told = time.monotonic() + self.settings.start_seconds, False
        while True:
            if self._process is not None and (status := self._process.poll()) is not None:
                raise ServerError(
                    f"rollout.remote.command ended with status {status}. The end of {self.log}:\n"
                    f"{_end_of(self.log)}"
                )
            found = self._serves()
            for name, folder in (found or {}).items():
                if folder == str(self.folder):
                    return name
            what = f"{self._root} to serve {self.folder}"
            if found and self._process is not None:
                raise ServerError(
                    f"{self._root} serves {_listed(found)}, found where rollout.remote.command was to "
                    f"serve {self.folder}. Does the command name {{model}}, and the port of the url?"
                )
            if time.monotonic() > until:
                there = "nobody answers there"
                if found is not None:
                    there = f"it serves {_listed(found)}"
                how = self.dialect.example.replace("{model}", str(self.folder))
                raise ServerError(
                    f"waited {self.settings.start_seconds:g} s for {what}; {there}. For instance: "
                    f"{how}"
                )
            if not told:
                self._say(f"waits for {what}")
                told = True
            time.sleep(_LOOK_EVERY)

    def _serves(self) -> dict[str, str] | None:
        """The folders that the server serves, by name; None if it does not answer, or not yet; none
        of them if it is of another kind."""
        headers = authorization(api_key(self.settings.key_env))
        try:
            answer = httpx2.get(
                self._root + self.dialect.model, headers=headers, timeout=10,
                trust_env=not is_here(self._root),
            )  # fmt: skip
        except httpx2.RequestError:
            return None
        if answer.status_code >= 500:  # it is loading
            return None
        if answer.status_code == 404:
            return {}
        if answer.status_code != 200:
            raise ServerError(
                f"{self._root}{self.dialect.model}: HTTP status {answer.status_code}. If it wants a key: "
                "rollout.remote.key_env names the environment variable that holds it"
            )
        try:
            return self.dialect.served(answer.json())
        except (ValueError, KeyError, TypeError):
            raise ServerError(
                f"{self._root}{self.dialect.model} does not answer as {self.settings.engine} does; is "
                "rollout.remote.engine right?"
            ) from None

    def _stop(self) -> None:
        if self._process is not None:
            keeper.stop(self._process, _TERMINATE_SECONDS)
            self._process = None


def _seed(*numbers: int) -> int:
    """A number of 31 bits for one response."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0] >> 1)


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _listed(served: Mapping[str, str]) -> str:
    return ", ".join(served.values()) or "nothing that rollout.remote.engine would"


def _end_of(log: Path) -> str:
    return log.read_bytes()[-_LAST_WORDS:].decode("utf-8", "replace")
