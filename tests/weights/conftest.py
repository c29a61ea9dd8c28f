"""A llama model of a few kilobytes as a GGUF file, tokenizer and all."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from tokenizers import pre_tokenizers

F32 = GGMLQuantizationType.F32
HIDDEN, INNER, HEADS, KV_HEADS, LAYERS, HEAD_DIM = 64, 96, 4, 2, 2, 16

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# All 256 bytes as byte-level BPE spells them, so that any text can be said.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("Ċ", "Ċ"), ("h", "e"), ("Ġ", "he"), ("l", "l"), ("he", "ll"), ("1", "2"), ("Ġ", "Ġ")]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def shapes(tied: bool) -> dict[str, tuple[int, ...]]:
    """GGUF names and numpy shapes of every tensor."""
    tokens = len(CONTROL) + len(ALPHABET) + len(MERGES)
    out = {"token_embd.weight": (tokens, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for i in range(LAYERS):
        layer = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HEADS * HEAD_DIM, HIDDEN),
            "attn_k": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_v": (KV_HEADS * HEAD_DIM, HIDDEN),
            "attn_output": (HIDDEN, HEADS * HEAD_DIM),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (INNER, HIDDEN),
            "ffn_up": (INNER, HIDDEN),
            "ffn_down": (HIDDEN, INNER),
        }
        out |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    return out if tied else out | {"output.weight": (tokens, HIDDEN)}


def write_tiny(
    path: Path,
    *,
    kind: GGMLQuantizationType = F32,
    tied: bool = True,
    seed: int = 0,
    drop: tuple[str, ...] = (),
    change: dict | None = None,
) -> Path:
    """Write the file. `drop` leaves out tensors or keys by name; `change` sets or adds them.

    A key's value is written by its Python type, a tensor (numpy array) as float32.
    """
    rng = np.random.default_rng(seed)
    tokens = CONTROL + ALPHABET + [a + b for a, b in MERGES]
    keys = {
        "general.architecture": "llama",
        "llama.block_count": LAYERS,
        "llama.context_length": 128,
        "llama.embedding_length": HIDDEN,
        "llama.feed_forward_length": INNER,
        "llama.attention.head_count": HEADS,
        "llama.attention.head_count_kv": KV_HEADS,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.freq_base": 100000.0,
        "llama.rope.dimension_count": HEAD_DIM,
        "llama.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [int(TokenType.CONTROL)] * 3 + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [f"{a} {b}" for a, b in MERGES],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
    }
    tensors = {}
    for name, shape in shapes(tied).items():
        value = rng.normal(1.0 if len(shape) == 1 else 0.0, 0.3, shape)
        tensors[name] = value.astype(np.float32)
    for name, value in (change or {}).items():
        (tensors if isinstance(value, np.ndarray) else keys)[name] = value
    assert set(drop) <= keys.keys() | tensors.keys()

    writer = GGUFWriter(path, keys.pop("general.architecture"))
    for key, value in keys.items():
        if key in drop:
            continue
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, value in tensors.items():
        if name in drop:
            continue
        # As in real files: norms stay float32, matrices are quantised.
        this = kind if value.ndim == 2 else F32
        writer.add_tensor(name, quantize(value, this), raw_dtype=this)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def tiny_gguf() -> Callable[..., Path]:
    return write_tiny
