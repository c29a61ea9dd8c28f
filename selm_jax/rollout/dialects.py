"""How vLLM and SGLang are spoken to: what a request says, and how an answer is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from selm_jax.rollout.sampling import Sampling
from selm_jax.shell.endpoint import ServerError


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


class Served(NamedTuple):
    """What a server has under one name.

    Attributes:
        folder: the model's path, as the server was given it.
        longest: most tokens of a prompt with its answer; None if it is not told.
    """

    folder: str
    longest: int | None = None


class Dialect(NamedTuple):
    """How a kind of server is spoken to.

    Attributes:
        generate, model, about: paths of its addresses; the last one tells its version.
        body: (name, prompt, sampling or None for the greedy answer, tokens at most, stop ids, seed)
            to the JSON of a request.
        read: the JSON of an answer to what was said.
        served: the JSON of `model` to what it serves, by the names that requests give.
        example: a command that starts it.
    """

    generate: str
    model: str
    about: str
    body: Callable[[str, Sequence[int], Sampling | None, int, Sequence[int], int], dict[str, Any]]
    read: Callable[[Any], Said]
    served: Callable[[Any], dict[str, Served]]
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


def _sglang_body(name, prompt, sampling, most, stop_ids, seed) -> dict[str, Any]:  # noqa: ARG001
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


def _vllm_served(tree: Any) -> dict[str, Served]:
    return {
        each["id"]: Served(each.get("root") or each["id"], each.get("max_model_len"))
        for each in tree["data"]
    }


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
    ),
    "sglang": Dialect(
        "/generate",
        "/get_model_info",
        "/get_server_info",
        _sglang_body,
        _sglang_said,
        lambda tree: {"": Served(tree["model_path"])},
        "python -m sglang.launch_server --model-path {model} --port {port}",
    ),
}
