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
    """Writes the file; with `split`, several files with that many tensors each. Returns the first.

    `drop` leaves out tensors or keys by name; `change` sets or adds them.

    A key's value is written by its Python type, a tensor (numpy array) as float32.
    """
    rng = np.random.default_rng(seed)
    tokens = CONTROL + ALPHABET + [a + b for a, b in MERGES]
    keys = {
        "general.architecture": arch,
        f"{arch}.block_count": LAYERS,
        f"{arch}.context_length": 128,
        f"{arch}.embedding_length": hidden,
        f"{arch}.feed_forward_length": inner,
        f"{arch}.attention.head_count": HEADS,
        f"{arch}.attention.head_count_kv": KV_HEADS,
        f"{arch}.attention.key_length": hidden // HEADS,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 100000.0,
        f"{arch}.rope.dimension_count": hidden // HEADS,
        f"{arch}.vocab_size": len(tokens),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
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
    for name, shape in shapes(arch, tied, hidden, inner).items():
        value = rng.normal(1.0 if "norm" in name else 0.0, 0.3, shape)
        tensors[name] = value.astype(np.float32)
    for name, value in (change or {}).items():
        (tensors if isinstance(value, np.ndarray) else keys)[name] = value
    assert set(drop) <= keys.keys() | tensors.keys()

    writer = GGUFWriter(path, keys.pop("general.architecture"), split_max_tensors=split)
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
        if this in K_BLOCKS:
            data = random_blocks(this, *value.shape, rng)
        else:
            data = quantize(value, this)
        writer.add_tensor(name, data, raw_dtype=this)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if path.exists() else min(path.parent.glob(f"{path.stem}-*"))
