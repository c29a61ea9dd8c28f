"""Real servers of language models, which `install.sh` puts into environments of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
from gguf import GGUFReader
from tiny_gguf import write_tiny

from selm_jax.weights.gguf import convert

STARTS = 900  # seconds that vLLM may take to start: its imports alone are 20 on a free machine


@pytest.fixture(autouse=True, scope="module")
def one_device() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        tiny.on_first_device(patch)
        patch.delenv("XLA_FLAGS", raising=False)  # for the processes that tests start
        yield


@pytest.fixture(scope="session")
def installed() -> Callable[[str], Path]:
    """installed(name) -> the environment of a server; without one the test is skipped."""

    def environment(name: str) -> Path:
        place = os.environ.get("SELM_SERVERS")
        if not place:
            pytest.skip("SELM_SERVERS is not set: bash tests/servers/install.sh FOLDER makes one")
        folder = Path(place).resolve() / name
        if not (folder / "installed").exists():
            pytest.skip(f"{folder} is not installed: bash tests/servers/install.sh {place}")
        return folder

    return environment


@pytest.fixture(scope="session")
def vllm(installed) -> Callable[..., dict[str, str | float]]:
    """vllm(port) -> the settings of `rollout.remote` that start a vLLM on the CPU.

    `serve` is the command with {model} and {options}; a test may put something in front.
    """

    def settings(port: int, serve: str = "{program} serve {{model}} {options}"):
        variables = (
            "VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=1 "
            "HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1"
        )
        options = (
            f"--host 127.0.0.1 --port {port} --served-model-name policy --dtype float32 "
            "--max-model-len 1280 --max-num-batched-tokens 8192 --enforce-eager "
            "--disable-uvicorn-access-log"
        )
        program = f"env -u PYTHONPATH {variables} {installed('vllm')}/bin/vllm"
        return {
            "engine": "vllm",
            "url": f"http://127.0.0.1:{port}",
            "command": serve.format(program=program, options=options),
            "start_seconds": STARTS,
        }

    return settings


class Model(NamedTuple):
    """The same weights as a file for llama.cpp and as a folder for vLLM and the engine here."""

    gguf: Path
    folder: Path


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Callable[[int], Model]:
    """models(seed) -> a random Llama of two layers that likes to begin an answer with m or M."""

    def make(seed: int) -> Model:
        base = tmp_path_factory.mktemp("model")
        of_vllm = {"hidden": 128, "inner": 256, "tied": False, "seed": seed}  # heads of 32
        plain = write_tiny(base / "plain.gguf", **of_vllm)
        reader = GGUFReader(plain)
        tokens = reader.fields["tokenizer.ggml.tokens"].contents()
        weights = {each.name: np.array(each.data) for each in reader.tensors}
        embedded, read = weights["token_embd.weight"], weights["output.weight"]
        for letter in "mM":  # an answer follows a line break, which the tokenizer writes as Ċ
            read[tokens.index(letter)] += 0.9 * embedded[tokens.index("Ċ")]
        change = {"output.weight": read, "llama.context_length": 2048}
        change["token_embd.weight"] = 20 * embedded  # or the layers would drown the token itself
        for name, value in weights.items():
            if name.endswith(("attn_output.weight", "ffn_down.weight")):
                change[name] = value / 5
        file = write_tiny(base / "model.gguf", **of_vllm, change=change)
        return Model(file, convert(file, base / "model"))

    return make
