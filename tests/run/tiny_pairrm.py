"""A tiny PairRM of random weights in the published layout, made without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from selm_jax.models.config_deberta import from_hf
from selm_jax.weights.deberta import _tensors

PREFIXES = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")
WORDS = [
    "the", "of", "and", "to", "in", "is", "you", "that", "it", "he", "was", "for", "on", "are",
    "with", "as", "his", "they", "at", "be", "this",
]  # fmt: skip


def write_tokenizer(file: Path, prefixes: Sequence[str] = PREFIXES) -> Tokenizer:
    """A unigram tokenizer made as DeBERTa-v3's is."""
    pieces = [*"abcdefghijklmnopqrstuvwxyz", "▁", *("▁" + word for word in WORDS)]
    vocab = [(token, 0.0) for token in ("[PAD]", "[CLS]", "[SEP]", "[UNK]")]
    vocab += [(piece, -1.0 / len(piece)) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Strip()])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer.add_special_tokens(["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]"])
    tokenizer.add_tokens(list(prefixes))
    tokenizer.enable_truncation(7)  # whoever wrote the file may have left this on
    tokenizer.save(str(file))
    return tokenizer


def make_pairrm(folder: Path) -> Path:
    """config.json, tokenizer.json and model.safetensors of a PairRM of 2 layers and width 32."""
    folder.mkdir(parents=True)
    tokenizer = write_tokenizer(folder / "tokenizer.json")
    hf = {
        "model_type": "deberta-v2", "vocab_size": tokenizer.get_vocab_size(), "hidden_size": 32,
        "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
        "hidden_act": "gelu", "layer_norm_eps": 1e-7, "relative_attention": True,
        "position_buckets": 256, "max_position_embeddings": 512, "max_relative_positions": -1,
        "pos_att_type": "p2c|c2p", "share_att_key": True, "norm_rel_ebd": "layer_norm",
        "position_biased_input": False, "type_vocab_size": 0,
    }  # fmt: skip
    keys = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id")
    ids = dict(zip(keys, map(tokenizer.token_to_id, PREFIXES), strict=True))
    (folder / "config.json").write_text(json.dumps(hf | ids | {"n_tasks": 1, "drop_out": 0.05}))
    rng = np.random.default_rng(0)
    tensors = {
        t.name.format(layer): rng.normal(t.path[-1] == "scale", 0.3, t.stored_shape)
        for t in _tensors(from_hf(hf), 1)
        for layer in range(hf["num_hidden_layers"] if "layers" in t.path else 1)
    }
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, folder / "model.safetensors")
    return folder
