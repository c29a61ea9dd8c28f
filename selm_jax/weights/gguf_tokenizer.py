"""The tokenizer inside a GGUF file, rebuilt as Hugging Face's tokenizer.json.

Byte-level BPE only: the file's tokens and merges, and a named rule for how text is cut before the
merges run.
"""

from __future__ import annotations

from typing import Any

from gguf import TokenType
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from selm_jax.weights.gguf_file import Fields, GGUFError

SPECIAL_IDS = {
    "bos": "tokenizer.ggml.bos_token_id",
    "eos": "tokenizer.ggml.eos_token_id",
    "pad": "tokenizer.ggml.padding_token_id",
    "unk": "tokenizer.ggml.unknown_token_id",
}


def _byte_level() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


# How text is cut before the merges run. GGUF carries only a name for it; what the name means is
# code. A wrong guess gives near-right tokens, so a name not listed here is an error.
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), _byte_level()]
    ),
}


def build_tokenizer(fields: Fields) -> Tokenizer:
    """The tokenizer, with every token under its own id; it adds no BOS by itself.

    Raises:
      GGUFError: a kind of tokenizer not known here, or lists that do not fit together.
    """
    model = fields.need("tokenizer.ggml.model", str)
    pre = fields.need("tokenizer.ggml.pre", str)
    if model != "gpt2" or pre not in _PRE_TOKENIZERS:
        raise GGUFError(
            f"{fields.path}: tokenizer {model!r} with pre {pre!r}; known here: 'gpt2' with "
            f"{sorted(_PRE_TOKENIZERS)}. Get the model as a Hugging Face folder instead"
        )
    for flag in ("add_bos_token", "add_eos_token", "add_space_prefix"):
        if fields.get(f"tokenizer.ggml.{flag}", bool):
            raise GGUFError(f"{fields.path}: tokenizer.ggml.{flag} is set; not converted here")

    tokens = fields.texts("tokenizer.ggml.tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        twice = next(token for i, token in enumerate(tokens) if vocab[token] != i)
        raise GGUFError(f"{fields.path}: token {twice!r} stands twice in the vocabulary")
    merges = []
    for row, merge in enumerate(fields.texts("tokenizer.ggml.merges")):
        left, _, right = merge.partition(" ")
        if not {left, right, left + right} <= vocab.keys():
            raise GGUFError(
                f"{fields.path}: tokenizer.ggml.merges, row {row}: {merge!r} uses or makes a token "
                "that is not in the vocabulary"
            )
        merges.append((left, right))

    # unk_token=None, as published: a byte the vocabulary lacks is left out, never turned into the
    # end-of-text mark.
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=None))
    tokenizer.pre_tokenizer = _PRE_TOKENIZERS[pre]()
    tokenizer.decoder = decoders.ByteLevel()

    types = fields.need("tokenizer.ggml.token_type", list)
    if len(types) != len(tokens):
        raise GGUFError(f"{fields.path}: {len(tokens)} tokens but {len(types)} token types")
    for token, kind in zip(tokens, types, strict=True):
        # Already in the vocabulary, so each keeps its id.
        if kind in (TokenType.CONTROL, TokenType.UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True)])
        elif kind == TokenType.USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, normalized=False, special=False)])
    return tokenizer


def tokenizer_config(fields: Fields, config: dict[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json says beside tokenizer.json; `config` is the model's."""
    tokens = fields.texts("tokenizer.ggml.tokens")
    special = {name: fields.get(key, int) for name, key in SPECIAL_IDS.items()}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{name}_token": tokens[i] for name, i in special.items() if i is not None},
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": config["max_position_embeddings"],
    }
