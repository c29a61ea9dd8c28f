"""A model of a few kilobytes as a GGUF file, tokenizer and all."""

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType
from gguf.quants import quantize
from tokenizers import pre_tokenizers

F32 = GGMLQuantizationType.F32
HIDDEN, INNER, HEADS, KV_HEADS, LAYERS = 64, 96, 4, 2, 2

CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# All 256 bytes as byte-level BPE spells them, so that any text can be said.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = [("Ċ", "Ċ"), ("h", "e"), ("Ġ", "he"), ("l", "l"), ("he", "ll"), ("1", "2"), ("Ġ", "Ġ")]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def shapes(arch: str, tied: bool, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    """GGUF names and numpy shapes of every tensor."""
    tokens, size = len(CONTROL) + len(ALPHABET) + len(MERGES), hidden // HEADS
    out = {"token_embd.weight": (tokens, hidden), "output_norm.weight": (hidden,)}
    for i in range(LAYERS):
        layer = {
            "attn_norm.weight": (hidden,),
            "attn_q.weight": (HEADS * size, hidden),
            "attn_k.weight": (KV_HEADS * size, hidden),
            "attn_v.weight": (KV_HEADS * size, hidden),
            "attn_output.weight": (hidden, HEADS * size),
            "ffn_norm.weight": (hidden,),
            "ffn_gate.weight": (inner, hidden),
            "ffn_up.weight": (inner, hidden),
            "ffn_down.weight": (hidden, inner),
        }
        if arch == "qwen2":
            layer |= {"attn_q.bias": (HEADS * size,)}
            layer |= dict.fromkeys(("attn_k.bias", "attn_v.bias"), (KV_HEADS * size,))
        if arch == "qwen3":
            layer |= dict.fromkeys(("attn_q_norm.weight", "attn_k_norm.weight"), (size,))
        out |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    return out if tied else out | {"output.weight": (tokens, hidden)}


# Bytes of a block of 256 numbers, and which of its float16 are scales (first bytes).
K_BLOCKS = {
    GGMLQuantizationType.Q4_K: (144, (0, 2)),
    GGMLQuantizationType.Q5_K: (176, (0, 2)),
    GGMLQuantizationType.Q6_K: (210, (208,)),
}


def random_blocks(kind: GGMLQuantizationType, rows: int, columns: int, rng) -> np.ndarray:
    """Rows of K-quants: any bytes are some numbers, as long as the scales are. gguf writes none."""
    size, scales = K_BLOCKS[kind]
    blocks = rng.integers(0, 256, (rows, columns // 256, size), dtype=np.uint8)
    for at in scales:
        small = rng.uniform(1e-4, 1e-2, (rows, columns // 256, 1)).astype("<f2")
        blocks[..., at : at + 2] = small.view(np.uint8)
    return blocks.reshape(rows, -1)


def write(path: Path, keys: dict, tensors: dict, split: int = 0) -> Path:
    """Writes the file: a key's value by its Python type, tensors as (numbers, type).

    With `split`, it writes several files with that many tensors each. Returns the first.
    """
    arch = keys.pop("general.architecture")
    writer = GGUFWriter(path, arch, split_max_tensors=split)
    add = {
        bool: writer.add_bool,
        int: writer.add_uint32,
        float: writer.add_float32,
        str: writer.add_string,
        list: writer.add_array,
    }
    for key, value in keys.items():
        add[type(value)](key, value)
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-*"))


def tokenizer_keys(tokens: list[str], merges: list[tuple[str, str]], special: int) -> dict:
    """The keys of a byte-level BPE tokenizer whose first `special` tokens are control tokens."""
    keys = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [int(TokenType.CONTROL)] * special + [1] * (len(tokens) - special),
        "merges": [f"{a} {b}" for a, b in merges],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 2,
        "unknown_token_id": 0,
        "add_bos_token": False,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def write_tiny(
    path: Path,
    *,
    kind: GGMLQuantizationType = F32,
    arch: str = "llama",
    pre: str = "smollm",
    tied: bool = True,
    seed: int = 0,
    hidden: int = HIDDEN,
    inner: int = INNER,
    drop: tuple[str, ...] = (),
    change: dict | None = None,
    split: int = 0,
) -> Path:
    """Writes a random model; `drop` leaves out tensors or keys by name, `change` sets or adds them.

    A tensor in `change` is a numpy array. `split` as for `write`.
    """
    rng = np.random.default_rng(seed)
    tokens = CONTROL + ALPHABET + [a + b for a, b in MERGES]
    of_model = {
        "block_count": LAYERS,
        "context_length": 128,
        "embedding_length": hidden,
        "feed_forward_length": inner,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": hidden // HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 100000.0,
        "rope.dimension_count": hidden // HEADS,
        "vocab_size": len(tokens),
    }
    keys = {f"{arch}.{key}": value for key, value in of_model.items()}
    keys |= tokenizer_keys(tokens, MERGES, len(CONTROL)) | {
        "general.architecture": arch,
        "tokenizer.ggml.pre": pre,
        "tokenizer.chat_template": TEMPLATE,
    }
    tensors = {
        name: rng.normal(1.0 if "norm" in name else 0.0, 0.3, shape).astype(np.float32)
        for name, shape in shapes(arch, tied, hidden, inner).items()
    }
    for name, value in (change or {}).items():
        (tensors if isinstance(value, np.ndarray) else keys)[name] = value
    assert set(drop) <= keys.keys() | tensors.keys()

    def stored(value: np.ndarray) -> tuple[np.ndarray, GGMLQuantizationType]:
        # As in real files: norms stay float32, matrices are quantised.
        this = kind if value.ndim == 2 else F32
        return random_blocks(this, *value.shape, rng) if this in K_BLOCKS else quantize(
            value, this
        ), this

    return write(
        path,
        {key: value for key, value in keys.items() if key not in drop},
        {name: stored(value) for name, value in tensors.items() if name not in drop},
        split,
    )
