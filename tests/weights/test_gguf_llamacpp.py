"""GGUF files read by llama.cpp itself: the log-probabilities of the converted folder.

llama.cpp is the definition of what a file means: the files that tests/weights/gguf_of.py writes
are right, and so is the conversion.
"""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from gguf_of import write_of
from test_gguf_families import GEMMA4, GRANITE4, HEAD_SIZE, LIMIT, LLAMA3, NO_WINDOW

from selm_jax.weights.gguf import convert

GOLDEN = Path(__file__).parents[1] / "golden"
_spec = importlib.util.spec_from_file_location("golden_families", GOLDEN / "families.py")
golden = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(golden)

# llama.cpp ignores YaRN's own slopes and rounds where they begin, and has windows in EXAONE 4 only
# with 64 layers.
YARN = {
    "rope_type": "yarn", "rope_theta": 5e5, "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 0.5,
    "original_max_position_embeddings": 128, "llama_4_scaling_beta": 0.3,
}  # fmt: skip
CASES = {
    "llama-2": {},
    "llama-3.1": {"rope_parameters": LLAMA3},
    "mixtral": {},
    "ministral-3": {"rope_parameters": YARN},
    "phi-3-128k": {},
    "phi-4-mini": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3-moe": {"norm_topk_prob": True},
    "gpt-oss": LIMIT | {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "smollm3": {},
    "olmo-2": {"attention_bias": False},
    "exaone-4": NO_WINDOW,
    "granite-3": {},
    "granite-4": GRANITE4,
    "glm-4": {},
    "gemma-1": {},
    "gemma-2": HEAD_SIZE,
    "gemma-3": HEAD_SIZE,
    "gemma-4": GEMMA4,
}
LENGTHS = (40, 600)


def next_tokens(file: Path, tokens: np.ndarray) -> np.ndarray:
    """llama.cpp's log-probabilities of the token after the first `LENGTHS` tokens."""
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp, the oracle, is not installed")
    params = llama.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(file), 1024, 1
    params.n_batch = params.n_ubatch = 1024
    params.cache_type_k = params.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup, params.fit_params, params.verbosity, params.swa_full = False, False, 0, True
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server, found = llama.Server(params), []
    for length in LENGTHS:
        asked = {"prompt": tokens[:length].tolist(), "n_predict": 1, "n_probs": 96, "samplers": []}
        (choice,) = server.handle_completions(asked)["choices"]
        (content,) = choice["logprobs"]["content"]
        each = {entry["id"]: entry["logprob"] for entry in content["top_logprobs"]}
        found.append([each[i] for i in range(96)])
    return np.array(found)


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_has_the_log_probabilities_of_the_converted_folder(tmp_path, name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    tokens = golden.tokens()[0]
    file, _ = write_of(GOLDEN / "families" / name, tmp_path / "m.gguf", CASES[name])
    theirs = next_tokens(file, tokens)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        convert(file, tmp_path / "out"), dtype=torch.float32, attn_implementation="eager"
    )
    for length, expected in zip(LENGTHS, theirs, strict=True):
        # With LongRoPE, llama.cpp takes the long table for its whole context.
        read = max(length, 600) if name.startswith("phi") else length
        logits = golden.logits(model.eval(), tokens[None, :read])[0, length - 1]
        ours = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0).numpy()
        # llama.cpp looks Gemma's GELU up in a table.
        np.testing.assert_allclose(ours, expected, atol=5e-3 if "gemma" in name else 2e-5, rtol=0)
