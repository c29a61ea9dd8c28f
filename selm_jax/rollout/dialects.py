"""The HTTP protocols of vLLM and SGLang: how a request is written, and how an answer is read."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from selm_jax.rollout.sampling import Sampling
from selm_jax.shell.endpoint import ServerError


class Said(NamedTuple):
    """One answer, parsed from a server's response.

    Attributes:
        tokens: token ids; the token that ended the answer is the last one or is missing, depending
            on the server.
        finish: "stop", "length", or anything else that the server says.
        end: the token that ended the answer, if the server says so.
        logps: the log-probability of each token, if the server says so: before temperature and
            filters from vLLM (with its default `--logprobs-mode`), after temperature and before
            filters from SGLang.
    """

    tokens: tuple[int, ...]
    finish: str
    end: int | None
    logps: tuple[float, ...] | None = None


class Served(NamedTuple):
    """A model that a server serves under one name.

    Attributes:
        folder: the model's path as it was given to the server.
        longest: the most tokens of a prompt with its answer; None if the server does not say.
    """

    folder: str
    longest: int | None = None


class Dialect(NamedTuple):
    """The HTTP protocol of one kind of server.

    Attributes:
        generate, model, about: URL paths; the last one returns the version.
        body: turns (name, prompt, sampling or None for the greedy answer, maximum tokens, stop ids,
            seed or None) into the JSON of a request.
        read: turns the JSON of an answer into `Said`.
        served: turns the JSON of `model` into the models that it serves, by name.
        example: a command that starts the server.
        tempered: whether log-probabilities are those after temperature. They are those of the
            policy only at temperature 1, or of a greedy answer.
    """

    generate: str
    model: str
    about: str
    body: Callable[
        [str, Sequence[int], Sampling | None, int, Sequence[int], int | None], dict[str, Any]
    ]
    read: Callable[[Any], Said]
    served: Callable[[Any], dict[str, Served]]
    example: str
    tempered: bool


def _vllm_body(name, prompt, sampling, most, stop_ids, seed) -> dict[str, Any]:
    return {
        "model": name,
        "prompt": list(prompt),
        "max_tokens": most,
        **({} if seed is None else {"seed": seed}),
        # vLLM ends at the model folder's eos token only; we may have more stop tokens.
        "ignore_eos": True,
        "stop_token_ids": list(stop_ids),
        "return_token_ids": True,
        "logprobs": 0,  # of the token itself, and of no others
        # All settings must be given, or vLLM takes missing ones from generation_config.json.
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        **_filters(sampling),
    }


def _sglang_body(name, prompt, sampling, most, stop_ids, seed) -> dict[str, Any]:  # noqa: ARG001
    # SGLang takes a seed only in a special mode, and ignores stop ids if `ignore_eos` is set.
    parameters = {
        "max_new_tokens": most,
        "stop_token_ids": list(stop_ids),
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        **_filters(sampling),
    }
    return {"input_ids": list(prompt), "sampling_params": parameters, "return_logprob": True}


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
        raise ServerError("missing its token ids; use a vLLM version that has `return_token_ids`")
    end = choice.get("stop_reason")
    logps = (choice.get("logprobs") or {}).get("token_logprobs")
    return Said(tuple(choice["token_ids"]), choice["finish_reason"], _token(end), _numbers(logps))


def _sglang_said(tree: Any) -> Said:
    if tree.get("output_ids") is None:
        raise ServerError("missing its token ids; use an SGLang version that returns `output_ids`")
    finish = tree["meta_info"]["finish_reason"]
    logps = tree["meta_info"].get("output_token_logprobs")  # of (number, token, text)
    return Said(
        tuple(tree["output_ids"]), finish["type"], _token(finish.get("matched")),
        None if logps is None else _numbers([each[0] for each in logps]),
    )  # fmt: skip


def _vllm_served(tree: Any) -> dict[str, Served]:
    return {
        each["id"]: Served(each.get("root") or each["id"], each.get("max_model_len"))
        for each in tree["data"]
    }


def _numbers(logps: Sequence[float | None] | None) -> tuple[float, ...] | None:
    if logps is None:
        return None
    return tuple(math.nan if number is None else float(number) for number in logps)


def kept_logps(
    dialect: Dialect, said: Said, tokens: int, sampling: Sampling | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """The log-probabilities of an answer's tokens, as `requests.Response` keeps them.

    Args:
        tokens: the number of tokens, with an end that the server may have left out; its number is
            then NaN.
        sampling: how the tokens were drawn; None for a greedy answer.

    Returns:
        (logps, sampled_logps); each is None if the server's numbers are of another distribution.
    """
    if said.logps is None or len(said.logps) not in (tokens, len(said.tokens)):
        return None, None
    logps = said.logps + (math.nan,) * (tokens - len(said.logps))
    if sampling is None:
        return logps, None
    plain, s = sampling.temperature == 1, sampling
    filtered = (s.top_k, s.top_p, s.min_p) != (0, 1, 0)
    return (
        logps if plain or not dialect.tempered else None,
        logps if (plain or dialect.tempered) and not filtered else None,
    )


def _token(end: Any) -> int | None:
    return end if isinstance(end, int) else None


DIALECTS: Mapping[str, Dialect] = {
    "vllm": Dialect(
        "/v1/completions",
        "/v1/models",
        "/version",
        _vllm_body,
        _vllm_said,
        _vllm_served,
        "vllm serve {model} --port {port} --served-model-name policy --generation-config vllm",
        tempered=False,
    ),
    "sglang": Dialect(
        "/generate",
        "/get_model_info",
        "/get_server_info",
        _sglang_body,
        _sglang_said,
        lambda tree: {"": Served(tree["model_path"])},
        "python -m sglang.launch_server --model-path {model} --port {port}",
        tempered=True,
    ),
}
